"""The Triton kernels of w4a16_gemm, each of its tiers; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from llmkern.triton_kernels.configs import Config
from llmkern.triton_kernels.w4a16_gemm import launch
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
    config: Config | None = None
    scale_dtype: torch.dtype = BF16
    symmetric: bool = False
    bias: bool = False


def gemv(rows: int, block_k: int = 256, split: int = 1) -> Config:
    return Config("gemv", rows, 16, block_k, split, True, 4, 3)


def exact(block_m: int, block_k: int, split: int = 1) -> Config:
    return Config("tile", block_m, 64, block_k, split, True, 4, 4)


def rounded(block_m: int, block_k: int, split: int = 1) -> Config:
    return Config("tile", block_m, 128, block_k, split, False, 8, 3)


CASES = {
    "gemv": Case(1, 35, 256, 128, BF16, gemv(1)),
    "gemv_k_tail_of_one_group": Case(1, 5, 32, 32, F16, gemv(1), symmetric=True),
    "gemv_split_k": Case(1, 33, 1088, 64, BF16, gemv(1, 256, 4), F32, bias=True),
    "gemv_two_rows_group_96": Case(2, 19, 480, 96, F16, gemv(2), bias=True),
    "gemv_three_rows_of_four": Case(3, 9, 576, 32, BF16, gemv(4, 128, 2), F16),
    "gemv_rows_of_float32": Case(3, 9, 288, 96, F32, gemv(4), F16, bias=True),
    "exact_m_tail_n_tail": Case(7, 67, 256, 128, BF16, exact(16, 128), F32, bias=True),
    "exact_group_32": Case(2, 9, 96, 32, F16, exact(16, 32), F16, symmetric=True),
    "exact_one_group_split_k": Case(17, 65, 1088, 1088, F16, exact(32, 64, 2), bias=True),
    "exact_group_not_a_power_of_two": Case(33, 8, 192, 96, BF16, exact(64, 32)),
    "exact_64_rows": Case(64, 64, 128, 64, BF16, exact(64, 64), symmetric=True),
    "tile_m_tail_n_tail": Case(70, 130, 160, 32, BF16, rounded(64, 32), bias=True),
    "tile_two_bands": Case(130, 1100, 64, 64, F16, rounded(128, 64), F16, symmetric=True),
    "tile_split_k": Case(66, 40, 512, 64, BF16, rounded(64, 64, 4), bias=True),
    "tile_float32_split_k": Case(5, 70, 512, 128, F32, rounded(32, 32, 2), F32, bias=True),
    "tile_float32_m_tail": Case(34, 12, 64, 64, F32, rounded(32, 32), symmetric=True),
    "more_splits_than_tiles": Case(5, 6, 160, 32, BF16, exact(16, 32, 16), bias=True),
    "one_row_of_the_table": Case(1, 20, 1088, 64, BF16, bias=True),
    "four_rows_of_the_table": Case(4, 20, 160, 32, F16),
    "sixteen_rows_of_the_table": Case(16, 40, 1024, 128, BF16),
    "seventy_rows_of_the_table": Case(70, 40, 192, 64, BF16),
    "float32_of_the_table": Case(6, 12, 512, 64, F32),
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


def multiply(
    case: Case, x: Tensor, weight: tuple[Tensor, Tensor, Tensor | None], bias: Tensor | None
) -> Tensor:
    """The product by the op, or by the kernel that the case asks for."""
    if case.config is None:
        with llmkern.use_backend("triton"):
            return w4a16_gemm(x, *weight, bias, group_size=case.group_size)
    out = torch.full((case.M, case.N), float("nan"), dtype=case.dtype, device=DEVICE)
    launch(x, *weight, bias, case.group_size, "canonical", out, case.config)
    return out


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_float64(case: Case) -> None:
    weight = make_weight(case)
    # Rows of x at a distance of more than K, the columns beyond K poisoned.
    x = torch.full((case.M, case.K + 8), float("nan"), dtype=case.dtype, device=DEVICE)[:, : case.K]
    x.copy_(torch.randn(case.M, case.K))
    bias = torch.randn(case.N, device=DEVICE).to(case.dtype) if case.bias else None
    out = multiply(case, x, weight, bias)
    wide = None if bias is None else bias.double()
    spec = reference(x.double(), *weight, wide, case.group_size)
    w = reference_dequantize(*weight, case.group_size, case.dtype)
    assert_matches(out, spec, torch.nn.functional.linear(x, w, bias))
    assert torch.equal(out, multiply(case, x, weight, bias))


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_rows_of_x_at_odd_addresses(dtype: torch.dtype) -> None:
    case = Case(3, 10, 64, 32, dtype, gemv(4, 64))
    weight = make_weight(case)
    x = torch.randn(case.M, case.K + 1, device=DEVICE).to(dtype)[:, 1:]
    out = multiply(case, x, weight, None)
    assert torch.equal(out, multiply(case, x.contiguous(), weight, None))


@pytest.mark.parametrize("M", [1, 3, 20, 65])
def test_unit_vectors_return_the_columns_of_w(M: int) -> None:
    case = Case(M, 40, 160, 32, BF16)
    qweight, scales, zeros = make_weight(case)
    columns = torch.randperm(case.K)[:M].to(DEVICE)
    x = torch.zeros(M, case.K, dtype=BF16, device=DEVICE)
    x[torch.arange(M, device=DEVICE), columns] = 1
    with llmkern.use_backend("triton"):
        out = w4a16_gemm(x, qweight, scales, zeros, group_size=32)
    assert torch.equal(out, reference_dequantize(qweight, scales, zeros, 32, BF16).t()[columns])


def test_rows_do_not_depend_on_the_batch_within_a_tier() -> None:
    case = Case(16, 20, 1024, 128, BF16)
    qweight, scales, zeros = make_weight(case)
    x = torch.randn(16, case.K, device=DEVICE).to(BF16)
    with llmkern.use_backend("triton"):
        whole = w4a16_gemm(x, qweight, scales, zeros, group_size=128)
        part = w4a16_gemm(x[3:8], qweight, scales, zeros, group_size=128)
    assert torch.equal(whole[3:8], part)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, in the interpreter
def test_infinity_in_a_row_stays_in_that_row() -> None:
    case = Case(4, 16, 128, 128, F16)
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
