"""The Triton kernels of lut4_gemm, each of its tiers; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from llmkern.triton_kernels.configs import Config
from llmkern.triton_kernels.lut4_gemm import launch
from torch import Tensor

import llmkern
from llmkern.ops import lut4_gemm
from llmkern.reference.lut4_gemm import dequantize_lut4
from llmkern.reference.lut4_gemm import lut4_gemm as reference
from llmkern.testing import assert_matches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    M: int
    N: int
    K: int
    group_size: int
    dtype: torch.dtype
    books: str = "tensor"  # one per tensor, row or group
    config: Config | None = None
    scale_dtype: torch.dtype | None = BF16
    bias: bool = False


def gemv(rows: int, block_k: int = 256, split: int = 1) -> Config:
    return Config("gemv", rows, 16, block_k, split, True, 4, 3)


def tile(block_m: int, block_k: int, split: int = 1, scale_sums: bool = True) -> Config:
    return Config("tile", block_m, 64, block_k, split, scale_sums, 4, 4)


CASES = {
    "gemv": Case(1, 35, 256, 64, BF16, config=gemv(1)),
    "gemv_split_k_row_books": Case(1, 33, 1088, 64, F16, "row", gemv(1, 256, 4), F32, True),
    "gemv_group_books_k_tail": Case(3, 9, 288, 96, BF16, "group", gemv(4, 128), None, True),
    "gemv_float32": Case(2, 5, 64, 32, F32, "group", gemv(2), F16),
    "sums_m_tail_n_tail": Case(7, 67, 256, 128, BF16, config=tile(16, 128), bias=True),
    "sums_row_books_split_k": Case(17, 65, 576, 64, F16, "row", tile(32, 64, 2), F32),
    "sums_group_books": Case(5, 9, 192, 96, BF16, "group", tile(16, 32), F16),
    "no_scales": Case(9, 20, 128, 32, BF16, "row", tile(16, 32), None, True),
    "weights_m_tail": Case(70, 66, 160, 32, BF16, "tensor", tile(64, 32, 1, False), BF16, True),
    "weights_group_books": Case(66, 40, 256, 64, F16, "group", tile(64, 64, 2, False), F32),
    "float32_tile": Case(6, 70, 512, 128, F32, "row", tile(32, 32, 2, False), F32, True),
    "one_row_of_the_table": Case(1, 20, 1088, 64, BF16),
    "four_rows_of_the_table": Case(4, 20, 160, 32, F16, "row"),
    "sixteen_rows_of_the_table": Case(16, 40, 1024, 128, BF16, "group"),
    "seventy_rows_of_the_table": Case(70, 40, 192, 64, BF16),
    "float32_of_the_table": Case(6, 12, 512, 64, F32),
}


def make_weight(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """(qweight, codebook, scales)."""
    groups = case.K // case.group_size
    qweight = torch.randint(-(2**31), 2**31, (case.N, case.K // 8), dtype=torch.int32)
    shape = {"tensor": (16,), "row": (case.N, 16), "group": (case.N, groups, 16)}[case.books]
    scales = None
    if case.scale_dtype is not None:
        scales = (torch.rand(case.N, groups) + 0.5).to(case.scale_dtype).to(DEVICE)
    return qweight.to(DEVICE), torch.randn(shape, device=DEVICE), scales


def multiply(
    case: Case, x: Tensor, weight: tuple[Tensor, Tensor, Tensor | None], bias: Tensor | None
) -> Tensor:
    """The product by the op, or by the kernel that the case asks for."""
    if case.config is None:
        with llmkern.use_backend("triton"):
            return lut4_gemm(x, *weight, bias, group_size=case.group_size)
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
    w = dequantize_lut4(*weight, case.group_size, case.dtype)
    assert_matches(out, spec, torch.nn.functional.linear(x, w, bias))
    assert torch.equal(out, multiply(case, x, weight, bias))


@pytest.mark.parametrize("M", [1, 3, 20, 65])
@pytest.mark.parametrize("books", ["tensor", "row", "group"])
def test_unit_vectors_return_the_columns_of_w(M: int, books: str) -> None:
    case = Case(M, 24, 96, 32, F32, books)
    weight = make_weight(case)
    columns = torch.randperm(case.K, device=DEVICE)[:M]
    x = torch.zeros(M, case.K, device=DEVICE)
    x[torch.arange(M, device=DEVICE), columns] = 1
    out = multiply(case, x, weight, None)
    assert torch.equal(out, dequantize_lut4(*weight, 32, F32).t()[columns])


def test_the_cpu_layout_is_refused_with_a_reason() -> None:
    with llmkern.use_backend("triton"), pytest.raises(NotImplementedError, match="cpu layout"):
        lut4_gemm(
            torch.ones(1, 32),
            torch.zeros(64, 16, dtype=torch.uint8),
            torch.ones(16),
            group_size=32,
            layout="cpu",
        )
