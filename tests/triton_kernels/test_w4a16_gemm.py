"""The Triton kernels of w4a16_gemm, each of its tiers; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from llmkern.triton_kernels.w4a16_gemm import select_config
from torch import Tensor

import llmkern
from llmkern.ops import w4a16_gemm
from llmkern.reference.w4a16_gemm import dequantize_int4 as reference_dequantize
from llmkern.reference.w4a16_gemm import w4a16_gemm as reference
from llmkern.testing import assert_matches, random_int4_weight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    M: int
    N: int
    K: int
    group_size: int
    dtype: torch.dtype
    tier: tuple[str, bool, int]  # kernel, EXACT and SPLIT_K that the shape must be served by
    scale_dtype: torch.dtype = BF16
    symmetric: bool = False
    bias: bool = False


CASES = {
    "gemv": Case(1, 35, 256, 128, BF16, ("gemv", True, 1)),
    "gemv_k_tail_of_one_group": Case(1, 5, 32, 32, F16, ("gemv", True, 1), symmetric=True),
    "gemv_split_k": Case(1, 33, 1088, 64, BF16, ("gemv", True, 4), F32, bias=True),
    "gemv_rows_of_float32": Case(3, 9, 288, 96, F32, ("gemv", True, 1), F16, bias=True),
    "exact_m_tail_n_tail": Case(7, 67, 256, 128, BF16, ("tile", True, 1), F32, bias=True),
    "exact_group_32": Case(2, 9, 96, 32, F16, ("tile", True, 1), F16, symmetric=True),
    "exact_one_group_split_k": Case(17, 65, 1088, 1088, F16, ("tile", True, 2), bias=True),
    "exact_group_not_a_power_of_two": Case(33, 8, 192, 96, BF16, ("tile", True, 1)),
    "exact_64_rows": Case(64, 64, 128, 64, BF16, ("tile", True, 1), symmetric=True),
    "tile_m_tail_n_tail": Case(70, 130, 160, 32, BF16, ("tile", False, 1), bias=True),
    "tile_two_bands": Case(130, 1100, 64, 64, F16, ("tile", False, 1), F16, symmetric=True),
    "tile_float32_split_k": Case(5, 70, 512, 128, F32, ("tile", False, 2), F32, bias=True),
    "tile_float32_m_tail": Case(34, 12, 64, 64, F32, ("tile", False, 1), symmetric=True),
}


def make_weight(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    weight = random_int4_weight(
        case.N,
        case.K,
        case.group_size,
        symmetric=case.symmetric,
        scale_dtype=case.scale_dtype,
    )
    return tuple(None if t is None else t.to(DEVICE) for t in weight)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_float64(case: Case) -> None:
    config = select_config(case.M, case.N, case.K, case.group_size, case.dtype == F32)
    assert (config.kernel, config.EXACT, config.SPLIT_K) == case.tier
    qweight, scales, zeros = make_weight(case)
    # Rows of x at a distance of more than K, the columns beyond K poisoned.
    x = torch.full((case.M, case.K + 8), float("nan"), dtype=case.dtype, device=DEVICE)[:, : case.K]
    x.copy_(torch.randn(case.M, case.K))
    bias = torch.randn(case.N, device=DEVICE).to(case.dtype) if case.bias else None
    with llmkern.use_backend("triton"):
        out = w4a16_gemm(x, qweight, scales, zeros, bias, group_size=case.group_size)
        again = w4a16_gemm(x, qweight, scales, zeros, bias, group_size=case.group_size)
    wide = None if bias is None else bias.double()
    spec = reference(x.double(), qweight, scales, zeros, wide, case.group_size)
    w = reference_dequantize(qweight, scales, zeros, case.group_size, case.dtype)
    assert_matches(out, spec, torch.nn.functional.linear(x, w, bias))
    assert torch.equal(out, again)


@pytest.mark.parametrize("M", [1, 20, 65])
def test_unit_vectors_return_the_columns_of_w(M: int) -> None:
    case = Case(M, 40, 160, 32, BF16, ("", False, 1))
    qweight, scales, zeros = make_weight(case)
    columns = torch.randperm(case.K)[:M].to(DEVICE)
    x = torch.zeros(M, case.K, dtype=BF16, device=DEVICE)
    x[torch.arange(M, device=DEVICE), columns] = 1
    with llmkern.use_backend("triton"):
        out = w4a16_gemm(x, qweight, scales, zeros, group_size=32)
    assert torch.equal(out, reference_dequantize(qweight, scales, zeros, 32, BF16).t()[columns])


def test_rows_do_not_depend_on_the_batch_within_a_tier() -> None:
    case = Case(16, 20, 1024, 128, BF16, ("", False, 1))
    qweight, scales, zeros = make_weight(case)
    x = torch.randn(16, case.K, device=DEVICE).to(BF16)
    with llmkern.use_backend("triton"):
        whole = w4a16_gemm(x, qweight, scales, zeros, group_size=128)
        part = w4a16_gemm(x[3:5], qweight, scales, zeros, group_size=128)
    assert torch.equal(whole[3:5], part)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, in the interpreter
def test_infinity_in_a_row_stays_in_that_row() -> None:
    case = Case(4, 16, 128, 128, F16, ("", False, 1))
    qweight, scales, zeros = make_weight(case)
    x = torch.randn(4, case.K, device=DEVICE).to(F16)
    with llmkern.use_backend("triton"):
        clean = w4a16_gemm(x, qweight, scales, zeros, group_size=128)
        x[2, 5] = float("inf")
        out = w4a16_gemm(x, qweight, scales, zeros, group_size=128)
    assert torch.equal(out[[0, 1, 3]], clean[[0, 1, 3]])
    assert not torch.isfinite(out[2]).any()


def test_the_cpu_layout_is_refused_with_a_reason() -> None:
    with llmkern.use_backend("triton"), pytest.raises(NotImplementedError, match="cpu layout"):
        w4a16_gemm(
            torch.ones(1, 32),
            torch.zeros(1, 1024, dtype=torch.uint8),
            torch.ones(1, 16),
            group_size=32,
            layout="cpu",
        )


@pytest.mark.parametrize("group_size", [32, 64, 128, 4096])
def test_the_split_of_k_does_not_depend_on_m(group_size: int) -> None:
    splits = {select_config(M, 1024, 4096, group_size, False).SPLIT_K for M in range(2, 65)}
    assert len(splits) == 1


def test_a_tile_lies_in_one_group() -> None:
    for M in (1, 2, 33, 64, 65, 4096):
        for group_size in (32, 64, 96, 128, 160, 11008, 14336):
            for float32 in (False, True):
                config = select_config(M, 4096, 14336, group_size, float32)
                assert config.kernel == "gemv" or group_size % config.BLOCK_K == 0
