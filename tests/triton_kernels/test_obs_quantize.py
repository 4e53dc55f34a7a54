"""The Triton kernel of obs_quantize; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from llmkern.triton_kernels import obs_quantize as obs_kernels
from torch import Tensor

import llmkern
from llmkern.formats.int4 import QuantFormat
from llmkern.ops import HessianFactor, ObsResult, factorize_hessian, obs_quantize
from llmkern.testing import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    N: int
    K: int
    fmt: QuantFormat
    group_scales: str = "dynamic"
    act_order: bool = False
    clip_search: bool = False
    scale_dtype: torch.dtype = F32


CASES = {
    "groups_of_32_in_two_blocks": Case(5, 160, QuantFormat(4, 32, False), scale_dtype=BF16),
    "group_larger_than_a_block": Case(3, 136, QuantFormat(8, 136, False)),
    "group_that_128_does_not_hold_evenly": Case(2, 150, QuantFormat(2, 50, True), clip_search=True),
    "static_groups_act_order": Case(3, 144, QuantFormat(3, 48, False), "static", True, False, F16),
    "clip_search_asymmetric": Case(4, 64, QuantFormat(4, 16, False), "dynamic", False, True, BF16),
    "one_symmetric_group": Case(1, 24, QuantFormat(4, None, True), scale_dtype=F16),
}


def correlated(K: int) -> Tensor:
    x = torch.randn(3 * K, K) @ torch.randn(K, K)
    return (x.t() @ x).div_(3 * K).to(DEVICE)


def quantize(backend: str, case: Case, w: Tensor, factor: HessianFactor) -> ObsResult:
    with llmkern.use_backend(backend):
        return obs_quantize(
            w,
            factor,
            case.fmt,
            group_scales=case.group_scales,
            clip_search=case.clip_search,
            scale_dtype=case.scale_dtype,
        )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_quantizes_like_the_reference(case: Case) -> None:
    w = torch.randn(case.N, case.K, device=DEVICE)
    factor = factorize_hessian(correlated(case.K), act_order=case.act_order)
    got = quantize("triton", case, w, factor)
    want = quantize("reference", case, w, factor)
    # Sums in another order may tip a weight that lies between two codes, but not many.
    assert (got.codes != want.codes).sum() <= 0.01 * w.numel()
    assert relative_error(got.scales, want.scales) < 1e-4
    assert (got.zeros is None) == (want.zeros is None)
    assert got.zeros is None or (got.zeros != want.zeros).sum() <= 0.01 * got.zeros.numel()
    assert relative_error(got.loss, want.loss) < 1e-3
    centre = 1 << (case.fmt.bits - 1) if got.zeros is None else got.zeros.float()
    centre = torch.as_tensor(centre, device=DEVICE).expand_as(got.scales)
    size = case.K // got.scales.shape[1]
    scales, zeros = (t.float().repeat_interleave(size, 1) for t in (got.scales, centre))
    assert torch.equal(got.w_hat, scales * (got.codes.float() - zeros))


def test_the_loss_is_the_error_in_the_hessian() -> None:
    H = correlated(136)
    w = torch.randn(2, 136, device=DEVICE)
    factor = factorize_hessian(H)
    got = quantize("triton", Case(2, 136, QuantFormat(3, 17, False)), w, factor)
    error = (w - got.w_hat).double()
    damped = H.double() + factor.damp * H.double().diagonal().mean() * torch.eye(136, device=DEVICE)
    assert relative_error(got.loss, (error @ damped * error).sum(1)) < 1e-4


@pytest.mark.parametrize("group_scales", ["dynamic", "static"])
def test_ties_round_to_even(group_scales: str) -> None:
    # An absmax of 7.5 makes the scale 1; an identity Hessian leaves every weight as it is.
    w = torch.tensor([[-7.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 6.5]], device=DEVICE)
    factor = factorize_hessian(torch.eye(8, device=DEVICE))
    got = quantize("triton", Case(1, 8, QuantFormat(4, 8, True), group_scales), w, factor)
    assert got.scales.item() == 1
    assert got.codes.tolist() == [[0, 6, 6, 8, 8, 10, 10, 14]]


def test_weights_far_outside_a_static_grid_are_clamped() -> None:
    w = torch.tensor([[1.0, -1.0, 0.5, 0.25]], device=DEVICE)
    U = torch.eye(4, device=DEVICE)
    U[0, 1], U[0, 2] = 1e12, -1e12
    factor = HessianFactor(
        U,
        torch.ones(4, device=DEVICE),
        None,
        torch.zeros(4, dtype=torch.bool, device=DEVICE),
        0.0,
        True,
    )
    got = quantize("triton", Case(1, 4, QuantFormat(4, 4, True), "static"), w, factor)
    want = quantize("reference", Case(1, 4, QuantFormat(4, 4, True), "static"), w, factor)
    assert torch.equal(got.codes, want.codes)
    assert set(got.codes[0, 1:3].tolist()) == {0, 15}


def test_rows_per_program_shrink_with_n() -> None:
    assert [obs_kernels.select_config(N).BLOCK_N for N in (64, 1056, 4096)] == [4, 8, 16]
