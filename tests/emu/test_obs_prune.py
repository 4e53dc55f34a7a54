"""obs_prune's CUDA kernels in the emulator: the block kernel's policies, and the choice of a mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkern import ops, use_backend
from llmkern.formats.int4 import QuantFormat
from llmkern.formats.lut4 import NF4_CODEBOOK, CodebookFormat, LutFormat
from llmkern.ops._obs_gpu import cuda_select
from llmkern.reference.obs_prune import keep_all_but_lowest, keep_highest_per_row
from llmkern.reference.obs_prune import obs_prune as oracle

N = 37  # a CTA has 32 rows
STATIC = {"group_scales": "static", "act_order": True}


def random_mask(K: int) -> torch.Tensor:
    return torch.rand(N, K, generator=torch.Generator().manual_seed(5)) < 0.6


# K, options
CASES = {
    "half_of_the_layer": (200, {"sparsity": 0.5}),
    "each_row": (136, {"sparsity": 0.31, "scope": "row"}),
    "nearly_all": (70, {"sparsity": 0.99}),
    "nothing": (40, {"sparsity": 0.0}),
    "act_order": (150, {"sparsity": 0.6, "act_order": True}),
    "a_given_mask": (150, {"mask": random_mask(150)}),
    "2_4": (140, {"pattern": (2, 4)}),
    "2_4_act_order": (144, {"pattern": (2, 4), "act_order": True}),
    "1_2": (18, {"pattern": (1, 2)}),
    "4_8": (136, {"pattern": (4, 8)}),
    "2_3_a_chunk_of_6": (135, {"pattern": (2, 3)}),
    "3_5_a_chunk_of_5": (130, {"pattern": (3, 5)}),
    "1_7_a_chunk_of_7": (133, {"pattern": (1, 7)}),
    "5_6": (132, {"pattern": (5, 6)}),
    "joint_groups_inside_a_block": (192, {"sparsity": 0.4, "fmt": QuantFormat(4, 32)}),
    "joint_groups_of_two_blocks": (
        288,
        {"sparsity": 0.5, "fmt": QuantFormat(3, 144, False), "scope": "row"},
    ),
    "joint_static": (160, {"sparsity": 0.5, "fmt": QuantFormat(4, 32, False), **STATIC}),
    "joint_int8": (48, {"sparsity": 0.5, "fmt": QuantFormat(8, None), "clip_search": True}),
    "joint_2_4": (160, {"pattern": (2, 4), "fmt": QuantFormat(4, 32, False)}),
    "joint_2_4_wide_groups": (288, {"pattern": (2, 4), "fmt": QuantFormat(2, 144)}),
    "joint_3_5_nf4": (120, {"pattern": (3, 5), "fmt": CodebookFormat(NF4_CODEBOOK, 40)}),
    "joint_fp4": (128, {"sparsity": 0.5, "fmt": LutFormat("fp4", 64)}),
    "joint_mask": (128, {"mask": random_mask(128), "fmt": QuantFormat(4, 64)}),
}


def problem(K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and a Hessian of correlated inputs, one of which never fires."""
    w = torch.randn(N, K)
    x = torch.randn(2 * K, K) @ (torch.eye(K) + 0.3 * torch.randn(K, K) / K**0.5)
    x[:, 11] = 0
    return w, x.t() @ x / K


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_prunes_like_the_reference(case, both_orders):
    K, options = case
    w, H = problem(K)

    def run():
        got = ops.obs_prune(w, H, **options)
        none = torch.zeros(0)
        return (
            got.mask,
            got.w_hat,
            got.loss,
            *(none if t is None else t for t in (got.codes, got.scales, got.zeros)),
        )

    mask, w_hat, loss, codes, _, _ = both_orders(run)
    with use_backend("reference"):
        want = ops.obs_prune(w, H, **options)
    assert not w_hat[~mask].any()
    # Of each n:m group, of each row or of all, never one too many.
    assert int(mask.sum()) == int(want.mask.sum())
    # Sums in another order turn an occasional near tie, and then what follows in that row.
    same = (mask == want.mask).all(1)
    if want.codes is not None:
        same &= (codes == want.codes).all(1)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(loss.sum(), want.loss.sum(), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(loss[same], want.loss[same], rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(w_hat[same], want.w_hat[same], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("case", ["half_of_the_layer", "each_row", "2_4", "joint_3_5_nf4"])
def test_counts_are_exact(case, emulator):
    K, options = CASES[case]
    mask = ops.obs_prune(*problem(K), **options).mask
    if "pattern" in options:
        n, m = options["pattern"]
        assert bool((mask.view(N, -1, m).sum(2) == n).all())
    elif options.get("scope") == "row":
        assert bool(((~mask).sum(1) == round(options["sparsity"] * K)).all())
    else:
        assert int((~mask).sum()) == round(options["sparsity"] * N * K)


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"pattern": (2, 4)}], ids=["half", "2_4"])
def test_loss_is_the_float64_oracles(options, emulator):
    w, H = problem(256)
    factor = ops.factorize_hessian(H)
    got = ops.obs_prune(w, factor, **options)
    kept, size = options.get("pattern", (0, 0))
    alive = w.masked_fill(factor.dead, 0.0)
    problem64 = (t.double() for t in (alive, factor.U, factor.d))
    selection = (None, options.get("sparsity", 0.0), kept, size, False, None)
    *_, loss = oracle(*problem64, *selection)
    torch.testing.assert_close(got.loss.double().sum(), loss.sum(), rtol=1e-3, atol=0)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_shape(data, emulator):
    rows = data.draw(st.integers(1, 40), "N")
    size = data.draw(st.integers(2, 8), "m")
    group_size = size * data.draw(st.integers(1, 140 // size), "units")
    K = group_size * data.draw(st.integers(1, max(1, 180 // group_size)), "groups")
    options = {"pattern": (data.draw(st.integers(1, size - 1), "n"), size)}
    if data.draw(st.booleans(), "unstructured"):
        scope = data.draw(st.sampled_from(["layer", "row"]), "scope")
        options = {"sparsity": data.draw(st.floats(0, 0.999), "sparsity"), "scope": scope}
    fmt = data.draw(st.sampled_from(["none", "int", "book"]), "fmt")
    if fmt == "int":
        options["fmt"] = QuantFormat(4, group_size, data.draw(st.booleans(), "symmetric"))
    if fmt == "book":
        options["fmt"] = CodebookFormat(NF4_CODEBOOK, group_size)
    w, x = torch.randn(rows, K), torch.randn(2 * K, K)
    H = x.t() @ x / K
    got = ops.obs_prune(w, H, **options)
    with use_backend("reference"):
        want = ops.obs_prune(w, H, **options)
    assert int(got.mask.sum()) == int(want.mask.sum())
    assert not got.w_hat[~got.mask].any()
    same = (got.mask == want.mask).all(1)
    if want.codes is not None:
        same &= (got.codes == want.codes).all(1)
    assert int((~same).sum()) <= max(2, 0.2 * rows)
    torch.testing.assert_close(got.loss[same], want.loss[same], rtol=3e-3, atol=1e-5)


def raw(E: int, K: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """w, U, d of a batch, as the ops take them: on the CPU their callers pass one matrix at a time."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(E, N, K, generator=generator)
    U = torch.randn(E, K, K, generator=generator).div_(K**0.5).triu(1) + torch.eye(K)
    return w, U, torch.rand(E, K, generator=generator) + 0.5


SELECTIONS = {  # sparsity, kept, size, per_row
    "layer": (0.5, 0, 0, False),
    "row": (0.5, 0, 0, True),
    "2_4": (0.0, 2, 4, False),
}


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("joint", [False, True], ids=["prune", "joint"])
def test_experts_have_the_bits_of_each_alone(selection, joint, both_orders):
    E, K = 3, 120  # one block: no matrix product, whose sums may differ
    w, U, d = raw(E, K)
    g_idx = (torch.arange(K) // 60).int().expand(E, K).contiguous() if joint else None
    book = torch.randn(E, N, 2, 16).sort(-1)[0] if joint else None
    scales = torch.rand(E, N, 2) + 0.5 if joint else None
    zeros = torch.zeros(E, N, 2) if joint else None

    def run(experts: slice = slice(None)):
        given = (None if t is None else t[experts] for t in (g_idx, book, scales, zeros))
        loop = (w[experts], U[experts], d[experts], None, *selection)
        options = (4, 60 if joint else 1, True, False, torch.float32)
        return torch.ops.llmkern.obs_prune(*loop, *given, *options)

    batch = both_orders(run)
    for e in range(E):
        for ours, alone in zip(batch, run(slice(e, e + 1)), strict=True):
            assert torch.equal(ours[e], alone[0])


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (2, 1, 1), (2, N, 1), (1, N, 3), (2, N, 3)],
    ids=["one", "experts", "rows", "groups_of_all_experts", "groups"],
)
def test_books_of_experts_rows_and_groups(shape, both_orders):
    """Static scales in an order that visits the groups in turn; several blocks; a mask."""
    E, K, groups = 2, 144, 3
    w, U, d = raw(E, K)
    g_idx = (torch.arange(K) % groups).int().expand(E, K).contiguous()
    scales, zeros = torch.rand(E, N, groups) + 0.5, torch.zeros(E, N, groups)
    mask, book = torch.rand(E, N, K) < 0.8, torch.randn(*shape, 16).sort(-1)[0]

    def run():
        arguments = (w, U, d, mask, g_idx, book, scales, zeros)
        options = (4, K // groups, True, False, torch.float32)
        return torch.ops.llmkern.obs_quantize(*arguments, *options)

    got = both_orders(run)
    with use_backend("reference"):
        want = run()
    same = (got[0] == want[0]).all(2)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(got[3][same], want[3][same])
    torch.testing.assert_close(got[4][same], want[4][same], rtol=1e-3, atol=1e-6)
    assert not got[3][~mask].any()


def select_by_sorting(reached, d, removed, per_row, mask):
    for e in range(len(reached)):
        costs = (reached[e] * d[e]).square()
        if per_row:
            mask[e] = keep_highest_per_row(costs, costs.shape[1] - removed)
        else:
            mask[e] = keep_all_but_lowest(costs, removed)


def test_a_tie_goes_to_the_lower_column_then_to_the_lower_row(emulator):
    """More ties than one CTA looks at, and each count that cuts them elsewhere."""
    E, rows, columns = 2, 300, 40
    reached = torch.ones(E, rows, columns)
    reached[0, 5] = 0.5
    reached[1, :, 3] = 2.0
    reached[1, 7] = -0.0
    d = torch.ones(E, columns)
    for removed in (1, 39, 40, 41, 4095, 4096, 4500, 11_999):
        got, want = torch.zeros(2, E, rows, columns + 3, dtype=torch.bool)
        cuda_select(reached, d, removed, False, got[..., 1:-2])
        select_by_sorting(reached, d, removed, False, want[..., 1:-2])
        assert torch.equal(got, want)
    for removed in (1, 17, 39):
        got, want = torch.zeros(2, E, rows, columns, dtype=torch.bool)
        cuda_select(reached, d, removed, True, got)
        select_by_sorting(reached, d, removed, True, want)
        assert torch.equal(got, want)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_selects_what_a_sort_selects(data, both_orders):
    E, rows = data.draw(st.integers(1, 3), "E"), data.draw(st.integers(1, 70), "N")
    columns = data.draw(st.integers(1, 128), "columns")
    per_row = data.draw(st.booleans(), "per_row")
    total = columns if per_row else rows * columns
    if total < 2:
        return
    removed = data.draw(st.integers(1, total - 1), "removed")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    reached = torch.randn(E, rows, columns, generator=generator)
    if data.draw(st.booleans(), "few_values"):
        reached = reached.round()
    reached *= 10.0 ** data.draw(st.integers(-22, 18), "scale")  # costs from 0 to infinity
    wide = torch.rand(E, columns + 5, generator=generator)
    d = wide[:, 2 : 2 + columns]

    def run():
        mask = torch.zeros(E, rows, columns + 1, dtype=torch.bool)
        cuda_select(reached, d, removed, per_row, mask[..., :columns])
        return mask

    got, want = both_orders(run), torch.zeros(E, rows, columns + 1, dtype=torch.bool)
    select_by_sorting(reached, d, removed, per_row, want[..., :columns])
    assert torch.equal(got, want)
