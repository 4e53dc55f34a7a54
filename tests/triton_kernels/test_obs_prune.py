"""obs_prune on Triton: the policies of its kernel; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from llmkern.triton_kernels.obs_prune import select
from torch import Tensor

import llmkern
from llmkern import ops
from llmkern.formats.int4 import QuantFormat
from llmkern.formats.lut4 import NF4_CODEBOOK, CodebookFormat, LutFormat
from llmkern.reference.obs_prune import keep_all_but_lowest, keep_highest_per_row
from llmkern.testing import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N = 7  # a program has 4 rows


def random_mask(K: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return (torch.rand(N, K, generator=generator) < 0.6).to(DEVICE)


# K, options
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "half_of_the_layer": (150, {"sparsity": 0.5}),
    "each_row": (70, {"sparsity": 0.31, "scope": "row"}),
    "a_given_mask": (140, {"mask": random_mask(140)}),
    "2_4_act_order": (132, {"pattern": (2, 4), "act_order": True}),
    "3_5": (130, {"pattern": (3, 5)}),
    "joint_wide_groups": (144, {"sparsity": 0.5, "fmt": QuantFormat(3, 144, False)}),
    "joint_int8": (48, {"sparsity": 0.5, "fmt": QuantFormat(8, None)}),
    "joint_2_4": (64, {"pattern": (2, 4), "fmt": QuantFormat(4, 32, False)}),
    "joint_1_8_nf4": (48, {"pattern": (1, 8), "fmt": CodebookFormat(NF4_CODEBOOK, 24)}),
    "joint_fp4": (64, {"sparsity": 0.5, "fmt": LutFormat("fp4", 32)}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_prunes_like_the_reference(case: tuple[int, dict[str, Any]]) -> None:
    K, options = case
    w = torch.randn(N, K, device=DEVICE)
    x = torch.randn(2 * K, K, device=DEVICE) @ torch.randn(K, K, device=DEVICE)
    H = x.t() @ x / (2 * K)
    with llmkern.use_backend("triton"):
        got = ops.obs_prune(w, H, **options)
    with llmkern.use_backend("reference"):
        want = ops.obs_prune(w, H, **options)
    assert not got.w_hat[~got.mask].any()
    assert int(got.mask.sum()) == int(want.mask.sum())
    # Sums in another order may tip a near tie, but not many.
    same = (got.mask == want.mask).all(1)
    if want.codes is not None:
        same &= (got.codes == want.codes).all(1)
    assert int((~same).sum()) <= 1
    assert relative_error(got.loss[same], want.loss[same]) < 1e-3
    torch.testing.assert_close(got.w_hat[same], want.w_hat[same], rtol=1e-2, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("joint", [False, True], ids=["prune", "joint"])
def test_experts_have_the_bits_of_each_alone(joint: bool) -> None:
    E, K = 3, 40  # one block: no matrix product, whose sums may differ
    w = torch.randn(E, N, K, device=DEVICE)
    U = torch.randn(E, K, K, device=DEVICE).div_(K**0.5).triu(1) + torch.eye(K, device=DEVICE)
    d = torch.rand(E, K, device=DEVICE) + 0.5
    book = torch.randn(E, N, 2, 16, device=DEVICE).sort(-1)[0]
    g_idx = (torch.arange(K, device=DEVICE) // 20).int().expand(E, K).contiguous()
    scales = torch.rand(E, N, 2, device=DEVICE) + 0.5
    grid = (g_idx, book, scales, torch.zeros_like(scales))

    def run(experts: slice) -> Any:
        given = (t[experts] if joint else None for t in grid)
        options = (4, 20 if joint else 1, True, False, torch.float32)
        loop = (w[experts], U[experts], d[experts], None, 0.0, 2, 4, False)
        with llmkern.use_backend("triton"):
            return torch.ops.llmkern.obs_prune(*loop, *given, *options)

    batch = run(slice(None))
    for e in range(E):
        for ours, alone in zip(batch, run(slice(e, e + 1)), strict=True):
            assert torch.equal(ours[e], alone[0])


def test_a_book_of_each_row_and_a_mask() -> None:
    w, mask = torch.randn(N, 48, device=DEVICE), random_mask(48)
    book = torch.cat([torch.randn(N, 15), torch.zeros(N, 1)], 1)
    H = torch.eye(48, device=DEVICE) + 0.1
    results = []
    for backend in ("triton", "reference"):
        with llmkern.use_backend(backend):
            fmt = CodebookFormat(book.to(DEVICE), None, False)
            results.append(ops.obs_quantize(w, H, fmt, mask=mask))
    got, want = results
    assert torch.equal(got.codes, want.codes)
    torch.testing.assert_close(got.w_hat, want.w_hat)
    assert not got.w_hat[~mask].any()


@pytest.mark.slow
@pytest.mark.parametrize("per_row", [False, True], ids=["layer", "row"])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_selects_what_a_sort_selects(ties: bool, per_row: bool) -> None:
    """With more ties than one program looks at, and counts that cut them elsewhere."""
    E, rows, columns = 2, 150, 40
    reached = torch.randn(E, rows, columns, device=DEVICE)
    if ties:
        reached = reached.div_(2).round()
        reached[1] = 0.0
    d = (torch.rand(E, columns + 3, device=DEVICE).round() + 0.5)[:, 1:-2]
    for removed in (1, 17, 39) if per_row else (1, 40, 151, 4097, 5999):
        got = torch.zeros(E, rows, columns + 3, dtype=torch.bool, device=DEVICE)
        select(reached, d, removed, per_row, got[..., 1:-2])
        for e in range(E):
            costs = (reached[e] * d[e]).square()
            want = (
                keep_highest_per_row(costs, columns - removed)
                if per_row
                else keep_all_but_lowest(costs, removed)
            )
            assert torch.equal(got[e, :, 1:-2], want)
        assert not got[..., 0].any()
        assert not got[..., -2:].any()
