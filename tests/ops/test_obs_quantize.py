from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import llmkern
from llmkern.formats.int4 import QuantFormat
from llmkern.formats.lut4 import (
    E2M1_CODEBOOK,
    FP4_CODEBOOK,
    NF4_CODEBOOK,
    CodebookFormat,
    LutFormat,
    quantize_blockwise,
)
from llmkern.ops import obs_quantize
from llmkern.ops._hessian_factor import factorize_hessian
from llmkern.ops.obs_quantize import quantize_grid
from llmkern.reference import obs_quantize as reference
from llmkern.testing import random_hessian as hessian
from llmkern.testing import row_losses

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weight(N: int, K: int, seed: int = 1) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * 0.05


def round_to_nearest(w: Tensor, fmt: QuantFormat, scale_dtype: torch.dtype) -> tuple:
    """Codes and weight of plain rounding on the min-max grid."""
    scales, zeros = quantize_grid(w, fmt, scale_dtype=scale_dtype)
    size = fmt.groups(w.shape[1])
    scales, zeros = scales.repeat_interleave(size, 1), zeros.repeat_interleave(size, 1)
    codes = reference.quantize_to_grid(w, scales, zeros, (1 << fmt.bits) - 1)
    return codes.to(torch.uint8), scales * (codes - zeros)


def classical_gptq(w: Tensor, H: Tensor, fmt: QuantFormat, act_order: bool) -> tuple:
    """GPTQ as published (arXiv 2210.17323, Alg. 1): rank-1 updates by the Cholesky factor of H⁻¹."""
    w = w.double().clone()
    N, K = w.shape
    size, top = fmt.groups(K), (1 << fmt.bits) - 1
    order = torch.argsort(H.diagonal(), descending=True, stable=True) if act_order else range(K)
    order = torch.as_tensor(list(order))
    H = (H + 0.01 * H.diagonal().mean() * torch.eye(K, dtype=H.dtype))[order][:, order]
    T = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    static = [
        reference.group_grid(w[:, g : g + size], fmt.bits, fmt.symmetric, False, torch.float32)
        for g in range(0, K, size)
    ]
    codes = torch.empty(N, K, dtype=torch.uint8)
    w_hat, work = torch.empty_like(w), w[:, order]
    for k, column in enumerate(order.tolist()):
        if act_order:
            scale, zero = static[column // size]
        elif k % size == 0:
            scale, zero = reference.group_grid(
                work[:, k : k + size], fmt.bits, fmt.symmetric, False, torch.float32
            )
        code = reference.quantize_to_grid(work[:, k], scale, zero, top)
        codes[:, column] = code.to(torch.uint8)
        w_hat[:, column] = scale * (code - zero)
        error = (work[:, k] - w_hat[:, column]) / T[k, k]
        work[:, k:] -= error[:, None] * T[k, k:]
    return codes, w_hat


@cache
def oracle(group_size: int, act_order: bool, seed: int) -> tuple:
    H, w, fmt = hessian(256, seed), weight(384, 256, seed), QuantFormat(4, group_size, False)
    return H, w, fmt, classical_gptq(w, H, fmt, act_order)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_specification_is_classical_gptq(group_size, act_order):
    H, w, _, (codes, w_hat) = oracle(group_size, act_order, 0)
    K = len(H)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(K, dtype=H.dtype)
    order = torch.arange(K)
    if act_order:
        order = torch.argsort(H.diagonal(), descending=True, stable=True)
    R = torch.linalg.cholesky(damped[order][:, order].flip(0, 1)).flip(0, 1)
    d = R.diagonal()
    scales, zeros = (
        torch.stack(parts, 1)
        for parts in zip(
            *(
                reference.group_grid(part.double(), 4, False, False, torch.float32)
                for part in w.split(group_size, 1)
            ),
            strict=True,
        )
    )
    g_idx = (order // group_size).int()
    options = (4, group_size, False, not act_order, False, torch.float32)
    ours, _, loss = reference.obs_quantize(
        w.double()[:, order], R / d, d, g_idx, scales, zeros, *options
    )
    assert torch.equal(ours, codes[:, order])
    expected = row_losses(w, w_hat, H, 0.01)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_loss_is_the_float64_oracles(backend, group_size, act_order):
    ours = best = nearest = 0.0
    for seed in range(3):
        H, w, fmt, (_, w_hat) = oracle(group_size, act_order, seed)
        scales = "static" if act_order else "dynamic"
        result = obs_quantize(w, H.float(), fmt, group_scales=scales, act_order=act_order)
        ours += float(row_losses(w, result.w_hat, H, 0.01).sum())
        best += float(row_losses(w, w_hat, H, 0.01).sum())
        _, rtn = round_to_nearest(w, fmt, torch.float32)
        nearest += float(row_losses(w, rtn, H, 0.01).sum())
    assert abs(ours / best - 1) < 1e-3
    assert ours < 0.8 * nearest


def test_brute_force_bounds_the_loss(backend):
    """No choice of codes on the same grid does better; with a diagonal H none does as well."""
    w, H, fmt = weight(40, 4), hessian(4), QuantFormat(2, None, False)
    result = obs_quantize(w, H.float(), fmt, group_scales="static")
    scales, zeros = result.scales, result.zeros.float()
    choices = torch.tensor(list(product(range(4), repeat=4)))
    grid = scales[:, :, None] * (choices - zeros[:, :, None])  # [N, 4^4, 4]
    E = (w[:, None] - grid).double()
    damped = H + result.damp * H.diagonal().mean() * torch.eye(4, dtype=H.dtype)
    best = (E @ damped * E).sum(-1).amin(1)
    assert bool((result.loss.double() >= best * (1 - 1e-5)).all())
    assert float((result.loss.double() <= best * (1 + 1e-5)).float().mean()) > 0.5
    diagonal = obs_quantize(w, torch.eye(4), fmt, group_scales="static")
    nearest = E.square().sum(-1).amin(1) * (1 + diagonal.damp)
    torch.testing.assert_close(diagonal.loss.double(), nearest, rtol=1e-5, atol=1e-12)


@dataclass(frozen=True)
class Call:
    N: int
    K: int
    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = False
    group_scales: str = "dynamic"
    act_order: bool = False
    clip_search: bool = False
    scale_dtype: torch.dtype = torch.float32

    def fmt(self) -> QuantFormat:
        return QuantFormat(self.bits, self.group_size, self.symmetric)

    def options(self) -> dict:
        names = ("group_scales", "act_order", "clip_search", "scale_dtype")
        return {name: getattr(self, name) for name in names}


CASES = {
    "one_row": Call(1, 256),
    "rows_beyond_a_strip": Call(33, 128),
    "rows_beyond_a_panel": Call(530, 64, group_size=32),
    "one_column": Call(5, 1, group_size=1),
    "k_below_a_block": Call(9, 96, group_size=48),
    "k_tail_130": Call(20, 130, group_size=65),
    "k_tail_200": Call(20, 200, group_size=100, symmetric=True),
    "k_beyond_an_outer_block": Call(12, 576, group_size=32),
    "bits_2": Call(16, 256, bits=2),
    "bits_3_symmetric": Call(16, 256, bits=3, symmetric=True),
    "bits_8": Call(16, 256, bits=8),
    "group_1": Call(6, 40, group_size=1, bits=2),
    "group_5": Call(70, 130, group_size=5),
    "group_64_symmetric": Call(16, 192, group_size=64, symmetric=True),
    "group_above_a_block": Call(12, 480, group_size=160),
    "group_above_an_outer_block": Call(7, 1200, group_size=600, symmetric=True),
    "group_per_row": Call(12, 200, group_size=None),
    "per_row_act_order_dynamic": Call(12, 200, group_size=None, act_order=True),
    "static": Call(16, 256, group_size=32, group_scales="static"),
    "static_k_tail": Call(16, 130, group_size=65, group_scales="static", symmetric=True),
    "act_order": Call(16, 320, group_size=32, group_scales="static", act_order=True),
    "clip_dynamic": Call(16, 256, group_size=32, clip_search=True),
    "clip_wide_group": Call(8, 512, group_size=256, clip_search=True, symmetric=True),
    "clip_static": Call(16, 256, bits=3, clip_search=True, group_scales="static"),
    "bf16_scales": Call(16, 256, scale_dtype=torch.bfloat16),
    "fp16_scales_clip": Call(16, 256, scale_dtype=torch.float16, clip_search=True),
}


def check_result(w: Tensor, H: Tensor, call: Call, result) -> None:
    """What holds for every result, whatever the codes."""
    size = call.fmt().groups(call.K)
    assert result.codes.dtype == torch.uint8
    assert int(result.codes.max()) < 1 << call.bits
    assert result.scales.dtype == call.scale_dtype
    assert result.scales.shape == (call.N, call.K // size)
    assert bool((result.scales > 0).all())
    zeros = result.zeros
    if call.symmetric:
        assert zeros is None
        zeros = torch.full(result.scales.shape, 1 << call.bits - 1)
    steps = result.codes.float() - zeros.float().repeat_interleave(size, 1)
    assert torch.equal(result.w_hat, result.scales.float().repeat_interleave(size, 1) * steps)
    losses = row_losses(w, result.w_hat, H, result.damp)
    torch.testing.assert_close(result.loss.double(), losses, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("call", CASES.values(), ids=CASES.keys())
def test_options(backend, call):
    H, w = hessian(call.K), weight(call.N, call.K)
    factor = factorize_hessian(H.float(), act_order=call.act_order)
    result = obs_quantize(w, factor, call.fmt(), **call.options())
    check_result(w, H, call, result)
    with llmkern.use_backend("reference"):
        spec = obs_quantize(w, factor, call.fmt(), **call.options())
    # A rounding error may flip a code, after which the rest of its row differs.
    assert float((result.codes == spec.codes).float().mean()) > 0.97
    close = torch.isclose(result.scales.float(), spec.scales.float(), rtol=0.01)
    assert float(close.float().mean()) > 0.9
    torch.testing.assert_close(result.loss.sum(), spec.loss.sum(), rtol=0.02, atol=1e-9)


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_shape(backend, data):
    size = data.draw(st.integers(1, 140), label="group_size")
    groups = data.draw(st.integers(1, max(1, 200 // size)), label="groups")
    static = data.draw(st.booleans(), label="static")
    call = Call(
        N=data.draw(st.integers(1, 70), label="N"),
        K=size * groups,
        bits=data.draw(st.sampled_from([2, 3, 4, 8]), label="bits"),
        group_size=size,
        symmetric=data.draw(st.booleans(), label="symmetric"),
        group_scales="static" if static else "dynamic",
        act_order=static and data.draw(st.booleans(), label="act_order"),
        clip_search=data.draw(st.booleans(), label="clip_search"),
        scale_dtype=data.draw(st.sampled_from(DTYPES), label="scale_dtype"),
    )
    H, w = hessian(call.K), weight(call.N, call.K)
    check_result(w, H, call, obs_quantize(w, H.float(), call.fmt(), **call.options()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_every_dtype(backend, dtype):
    w, H = weight(8, 128).to(dtype), hessian(128).float()
    result = obs_quantize(w, H, QuantFormat(4, 32))
    wide = obs_quantize(w.float(), H, QuantFormat(4, 32), scale_dtype=dtype)
    assert result.scales.dtype == dtype
    assert torch.equal(result.codes, wide.codes)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_clip_search_never_raises_a_groups_error(backend, symmetric, scale_dtype):
    """With H = I nothing is fed back: each group is rounded on the grid of its own weights."""
    w, fmt = weight(70, 192), QuantFormat(3, 32, symmetric)
    errors = {}
    for clip in (False, True):
        result = obs_quantize(w, torch.eye(192), fmt, clip_search=clip, scale_dtype=scale_dtype)
        errors[clip] = (w - result.w_hat).double().square().view(70, 6, 32).sum(2)
    assert bool((errors[True] <= errors[False] * (1 + 1e-6)).all())
    assert float(errors[True].sum()) < 0.95 * float(errors[False].sum())


def test_static_grids_come_from_the_original_weight(backend):
    w, H, fmt = weight(9, 128), hessian(128).float(), QuantFormat(4, 32, False)
    scales, zeros = quantize_grid(w, fmt)
    static = obs_quantize(w, H, fmt, group_scales="static")
    assert torch.equal(static.scales, scales)
    assert torch.equal(static.zeros.float(), zeros)
    dynamic = obs_quantize(w, H, fmt)
    assert torch.equal(dynamic.scales[:, 0], scales[:, 0])
    assert not torch.equal(dynamic.scales[:, 1:], scales[:, 1:])


def test_act_order_of_a_sorted_hessian_changes_nothing(backend):
    H = hessian(96)
    H = H[H.diagonal().argsort(descending=True)][:, H.diagonal().argsort(descending=True)].float()
    w, fmt = weight(10, 96), QuantFormat(4, 32)
    results = [
        obs_quantize(w, H, fmt, group_scales="static", act_order=act_order)
        for act_order in (False, True)
    ]
    assert torch.equal(results[0].codes, results[1].codes)


def test_a_shared_factor_is_the_hessian(backend):
    w, H = weight(10, 96), hessian(96).float()
    direct = obs_quantize(w, H, QuantFormat(4, 32), damp=0.05)
    shared = obs_quantize(w, factorize_hessian(H, damp=0.05), QuantFormat(4, 32))
    assert direct.damp == shared.damp == 0.05
    assert torch.equal(direct.codes, shared.codes)


def test_rows_do_not_see_each_other():
    """One row alone, among others, and on any number of threads: the same bits."""
    w, H, fmt = weight(100, 160), hessian(160).float(), QuantFormat(4, 32)
    threads = torch.get_num_threads()
    with llmkern.use_backend("cpu"):
        whole = obs_quantize(w, H, fmt)
        factor = factorize_hessian(H)
        try:
            for count in (1, 3):
                torch.set_num_threads(count)
                assert torch.equal(obs_quantize(w, factor, fmt).w_hat, whole.w_hat)
        finally:
            torch.set_num_threads(threads)
        for row in (0, 37, 99):
            alone = obs_quantize(w[row : row + 1].contiguous(), factor, fmt)
            assert torch.equal(alone.w_hat[0], whole.w_hat[row])
            assert torch.equal(alone.loss[0], whole.loss[row])


@pytest.mark.parametrize("symmetric", [False, True])
def test_dead_columns_become_zero(backend, symmetric):
    H, w = hessian(64), weight(5, 64)
    H[[3, 40]] = 0
    H[:, [3, 40]] = 0
    result = obs_quantize(w, H.float(), QuantFormat(4, 32, symmetric))
    assert torch.equal(result.w_hat[:, [3, 40]], torch.zeros(5, 2))
    alive = torch.ones(64, dtype=torch.bool)
    alive[[3, 40]] = False
    assert bool((result.w_hat[:, alive] != 0).any(0).all())


def test_rows_and_groups_of_zeros(backend):
    w = weight(6, 64)
    w[2] = 0
    w[4, :32] = 0
    result = obs_quantize(w, torch.eye(64), QuantFormat(4, 32, False))
    assert torch.equal(result.w_hat[2], torch.zeros(64))
    assert torch.equal(result.w_hat[4, :32], torch.zeros(32))
    assert float(result.scales[2, 0]) == 1.0
    assert float(result.loss[2]) == 0.0


@pytest.mark.parametrize("kind", ["rank_5", "condition_1e12"])
def test_hard_hessians(backend, kind):
    w = weight(30, 96)
    if kind == "rank_5":
        x = torch.randn(5, 96, dtype=torch.float64)
        H = x.t() @ x
    else:
        Q = torch.linalg.qr(torch.randn(96, 96, dtype=torch.float64)).Q
        H = (Q * torch.logspace(-12, 0, 96, dtype=torch.float64)) @ Q.t()
    result = obs_quantize(w, H.float(), QuantFormat(4, 32))
    assert result.factored
    ours = row_losses(w, result.w_hat, H, result.damp).sum()
    _, rtn = round_to_nearest(w, QuantFormat(4, 32), torch.float32)
    assert float(ours) < 0.5 * float(row_losses(w, rtn, H, result.damp).sum())


def test_a_hessian_that_cannot_be_factored_gives_round_to_nearest_and_a_flag(backend):
    w, fmt = weight(12, 64), QuantFormat(4, 32)
    result = obs_quantize(w, torch.full((64, 64), 5.0) - 4 * torch.eye(64), fmt)
    codes, w_hat = round_to_nearest(w, fmt, torch.float32)
    assert not result.factored
    assert torch.equal(result.codes, codes)
    assert torch.equal(result.w_hat, w_hat)


def magnitude_mask(w: Tensor) -> Tensor:
    return w.abs() > w.abs().flatten().median()


@pytest.mark.parametrize("group_scales", ["dynamic", "static"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_pruned_weights_stay_zero_and_their_errors_are_made_up_for(
    backend, group_scales, symmetric
):
    H, w, fmt = hessian(256), weight(40, 256), QuantFormat(4, 32, symmetric)
    mask = magnitude_mask(w)
    result = obs_quantize(w, H.float(), fmt, mask=mask, group_scales=group_scales)
    assert not bool(result.w_hat[~mask].any())
    zeros = 8 if symmetric else result.zeros.repeat_interleave(32, 1)
    assert bool((result.codes == zeros)[~mask].all())
    _, rtn = round_to_nearest(w * mask, fmt, torch.float32)
    ours = row_losses(w, result.w_hat, H, result.damp)
    torch.testing.assert_close(result.loss.double(), ours, rtol=1e-4, atol=1e-9)
    assert float(ours.sum()) < 0.8 * float(row_losses(w, rtn, H, result.damp).sum())


def test_a_mask_of_ones_changes_nothing(backend):
    H, w, fmt = hessian(96).float(), weight(9, 96), QuantFormat(4, 32, False)
    masked = obs_quantize(w, H, fmt, mask=torch.ones_like(w, dtype=torch.bool))
    plain = obs_quantize(w, H, fmt)
    assert torch.equal(masked.codes, plain.codes)
    assert float((masked.loss - plain.loss).abs().max()) < 1e-6 * float(plain.loss.max())


def with_zero(*shape: int) -> Tensor:
    book = torch.randn(*shape, 16, generator=torch.Generator().manual_seed(5))
    book[..., 4] = 0
    return book


# N = 20, K = 160
BOOKS = {
    "nf4": CodebookFormat(NF4_CODEBOOK, 32),
    "fp4_of_bitsandbytes": LutFormat("fp4", 32),
    "e2m1": CodebookFormat(E2M1_CODEBOOK, 16),
    "book_per_row": CodebookFormat(with_zero(20), 80),
    "book_per_group": CodebookFormat(with_zero(20, 5), 32),
    "values_per_row": CodebookFormat(0.05 * with_zero(20), None, scaled=False),
    "one_scale_per_row": CodebookFormat(NF4_CODEBOOK, None),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fmt", BOOKS.values(), ids=BOOKS.keys())
def test_books(backend, fmt, masked):
    H, w = hessian(160), weight(20, 160)
    factor = factorize_hessian(H.float())
    options = {"mask": magnitude_mask(w)} if masked else {"clip_search": True}
    result = obs_quantize(w, factor, fmt, **options)
    with llmkern.use_backend("reference"):
        spec = obs_quantize(w, factor, fmt, **options)
    assert float((result.codes == spec.codes).float().mean()) > 0.97
    torch.testing.assert_close(result.loss.sum(), spec.loss.sum(), rtol=0.01, atol=0)
    book = FP4_CODEBOOK if isinstance(fmt, LutFormat) else fmt.codebook
    groups = result.scales.shape[1]
    rows = book.view(-1, 1, 16) if book.dim() < 3 else book
    values = rows.expand(20, groups, 16).gather(2, result.codes.view(20, groups, -1).long())
    assert torch.equal(result.w_hat, (result.scales[..., None] * values).view(20, 160))
    assert result.zeros is None
    losses = row_losses(w, result.w_hat, H, result.damp)
    torch.testing.assert_close(result.loss.double(), losses, rtol=1e-4, atol=1e-9)
    if masked:
        assert not bool(result.w_hat[~options["mask"]].any())


def test_books_do_better_than_rounding_to_them(backend):
    H, w = hessian(128), weight(30, 128)
    codes, absmax = quantize_blockwise(w, NF4_CODEBOOK, 64)
    rtn = NF4_CODEBOOK[codes.long()] * absmax.view(30, 2).repeat_interleave(64, 1)
    result = obs_quantize(w, H.float(), LutFormat("nf4", 64))
    ours, nearest = (float(row_losses(w, q, H, 0.01).sum()) for q in (result.w_hat, rtn))
    assert ours < 0.8 * nearest


def test_books_with_an_identity_hessian_are_rounding_to_nearest(backend):
    w = weight(12, 128)
    codes, absmax = quantize_blockwise(w, NF4_CODEBOOK, 64)
    result = obs_quantize(w, torch.eye(128), LutFormat("nf4", 64))
    assert torch.equal(result.scales, absmax.view(12, 2))
    assert float((result.codes == codes).float().mean()) > 0.999


@pytest.mark.parametrize("act_order", [False, True])
def test_a_batch_is_its_matrices(backend, act_order):
    H = torch.stack([hessian(96, seed) for seed in range(3)]).float()
    w = torch.stack([weight(10, 96, seed) for seed in range(3)])
    H[1] = 5.0 - 4 * torch.eye(96)  # indefinite
    options = {"act_order": act_order, "group_scales": "static" if act_order else "dynamic"}
    book = CodebookFormat(with_zero(3, 10), 32)
    for fmt, alone in ((QuantFormat(4, 32, False), None), (book, book.codebook)):
        mask = magnitude_mask(w)
        batch = obs_quantize(w, H, fmt, mask=mask, **options)
        assert not batch.factored
        assert batch.unfactored == (1,)
        for e in range(3):
            one = fmt if alone is None else CodebookFormat(alone[e], 32)
            single = obs_quantize(w[e], H[e], one, mask=mask[e], **options)
            assert torch.equal(batch.w_hat[e], single.w_hat)
            assert torch.equal(batch.codes[e], single.codes)
            assert torch.equal(batch.scales[e], single.scales)
    factors = [factorize_hessian(h, act_order=act_order) for h in H]
    listed = obs_quantize(w, factors, book, mask=mask, **options)
    assert torch.equal(listed.codes, batch.codes)


def raw_arguments(N: int = 6, K: int = 40, **changes) -> tuple:
    """Arguments of the torch op, one of them changed."""
    factor = factorize_hessian(hessian(K).float())
    arguments = {
        "w": weight(N, K)[None],
        "U": factor.U[None],
        "d": factor.d[None],
        "mask": None,
        "g_idx": torch.arange(K, dtype=torch.int32)[None] // 20,
        "codebook": None,
        "scales": None,
        "zeros": None,
        "bits": 4,
        "group_size": 20,
        "symmetric": False,
        "clip_search": False,
        "scale_dtype": torch.float32,
    }
    assert set(changes) <= set(arguments)
    return tuple((arguments | changes).values())


STATIC = {"scales": torch.full((1, 6, 2), 0.01), "zeros": torch.full((1, 6, 2), 8.0)}


BOOK = {
    "codebook": NF4_CODEBOOK.view(1, 1, 1, 16),
    "mask": (torch.arange(240) % 3 > 0).view(1, 6, 40),
}


@pytest.mark.parametrize("changes", [{}, STATIC, BOOK], ids=["dynamic", "static", "book_and_mask"])
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_opcheck(name, changes):
    with llmkern.use_backend(name):
        torch.library.opcheck(torch.ops.llmkern.obs_quantize.default, raw_arguments(**changes))


def test_no_rows(backend):
    result = obs_quantize(torch.empty(0, 64), torch.eye(64), QuantFormat(4, 32))
    assert result.codes.shape == (0, 64)
    assert result.loss.shape == (0,)


I32 = torch.int32
BAD_RAW = {
    "w_dtype": ({"w": weight(6, 40).double()[None]}, "w: got float64"),
    "w_axes": ({"w": weight(6, 40)}, r"w: got float32 \[6, 40\] .*\[E, N, K\]"),
    "w_strided": ({"w": weight(40, 6).t()[None]}, "w: got .*contiguous"),
    "U_shape": ({"U": torch.eye(39)[None]}, r"U: got float32 \[1, 39, 39\].*\[1, 40, 40\]"),
    "d_dtype": ({"d": torch.ones(1, 40).double()}, "d: got float64"),
    "mask_dtype": ({"mask": torch.ones(1, 6, 40)}, r"mask: got float32 .*bool \[1, 6, 40\]"),
    "g_idx_dtype": ({"g_idx": torch.zeros(1, 40, dtype=torch.int64)}, "g_idx: got int64"),
    "g_idx_range": ({"g_idx": torch.full((1, 40), 2, dtype=I32)}, "g_idx: got .* 2"),
    "g_idx_negative": ({"g_idx": torch.full((1, 40), -1, dtype=I32)}, "g_idx: got .*-1"),
    "g_idx_dynamic": ({"g_idx": torch.zeros(1, 40, dtype=I32)}, "g_idx: .*dynamic"),
    "codebook": ({"codebook": torch.zeros(1, 5, 1, 16)}, r"codebook: got float32 \[1, 5, 1, 16\]"),
    "group_size": ({"group_size": 15}, "group_size: got 15, expected a divisor of K = 40"),
    "group_size_0": ({"group_size": 0}, "group_size: got 0"),
    "bits": ({"bits": 5}, r"bits: got 5, expected one of \(2, 3, 4, 8\)"),
    "scale_dtype": ({"scale_dtype": torch.float64}, "scale_dtype: got torch.float64"),
    "one_of_two": ({"scales": torch.ones(1, 6, 2)}, "scales and zeros: got only one"),
    "scales_shape": (STATIC | {"scales": torch.ones(1, 6, 3)}, r"scales: got float32 \[1, 6, 3\]"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_RAW.values(), ids=BAD_RAW.keys())
def test_the_op_refuses_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.llmkern.obs_quantize(*raw_arguments(**changes))


EYE = torch.eye(64)
BAD = {
    "w_vector": (torch.zeros(64), EYE, {}, "w: got float32"),
    "w_integers": (torch.zeros(2, 64, dtype=torch.int32), EYE, {}, "w: got int32"),
    "w_nan": (torch.full((2, 64), float("nan")), EYE, {}, "w: got NaN or Inf"),
    "w_inf": (torch.full((2, 64), float("inf")), EYE, {}, "w: got NaN or Inf"),
    "h_shape": (weight(2, 64), torch.eye(32), {}, r"H: got \[32, 32\], expected \[64, 64\]"),
    "h_axes": (weight(2, 64), EYE[None], {}, r"H: got float32 \[1, 64, 64\] .*2 axes"),
    "h_count": (weight(2, 64)[None], [], {}, "H: got 0 Hessians, expected 1"),
    "mask_shape": (
        weight(2, 64),
        EYE,
        {"mask": torch.ones(64, dtype=torch.bool)},
        "mask: got bool",
    ),
    "no_matrices": (torch.zeros(0, 2, 64), EYE[None][:0], {}, r"w: got float32 \[0, 2, 64\]"),
    "h_nan": (weight(2, 64), EYE * float("nan"), {}, "H: got NaN or Inf"),
    "group_scales": (weight(2, 64), EYE, {"group_scales": "exact"}, "group_scales: got 'exact'"),
    "act_order": (weight(2, 64), EYE, {"act_order": True}, "got 'dynamic' with act-order"),
    "book_shape": (
        weight(2, 64),
        EYE,
        {"fmt": CodebookFormat(torch.ones(3, 16), 32)},
        r"codebook: got float32 \[3, 16\] .*\[16\] or \[2, 16\] or \[2, 2, 16\]",
    ),
    "book_without_zero": (
        weight(2, 64),
        EYE,
        {
            "fmt": CodebookFormat(torch.arange(1.0, 17), 32),
            "mask": torch.ones(2, 64, dtype=torch.bool),
        },
        "codebook: got a book without 0",
    ),
    "blocks_across_rows": (
        weight(2, 64),
        EYE,
        {"fmt": LutFormat("nf4", 128)},
        "block_size: got 128",
    ),
    "damp": (weight(2, 64), EYE, {"damp": 2.0}, "damp: got 2.0"),
    "group_size": (weight(2, 64), EYE, {"fmt": QuantFormat(4, 48)}, "group_size: got 48"),
}


@pytest.mark.parametrize(("w", "H", "options", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(w, H, options, message):
    options = {"fmt": QuantFormat(4, 32)} | options
    with pytest.raises(ValueError, match=message):
        obs_quantize(w, H, **options)
