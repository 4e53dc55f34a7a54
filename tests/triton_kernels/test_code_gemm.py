"""The Triton kernels of w4a16_gemm and lut4_gemm, each tier; in the interpreter where there is no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from llmkern.triton_kernels import lut4_gemm, w4a16_gemm
from llmkern.triton_kernels.configs import Config
from torch import Tensor

import llmkern
from llmkern import ops
from llmkern.testing import CodeCase

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """A product, and the kernel that does it; None: the one of the table."""

    product: CodeCase
    dtype: torch.dtype
    config: Config | None = None
    bias: bool = False

    def multiply(self, x: Tensor, weight: tuple[Any, ...], bias: Tensor | None = None) -> Tensor:
        """x wᵀ + bias by that kernel."""
        if self.config is None:
            with llmkern.use_backend("triton"):
                return self.product.multiply(x, weight, bias)
        launch: Any = w4a16_gemm.launch if self.product.integers else lut4_gemm.launch
        out = torch.full((len(x), self.product.N), float("nan"), dtype=self.dtype, device=DEVICE)
        launch(x, *weight, bias, self.product.group_size, "canonical", out, self.config)
        return out


def gemv(rows: int, block_k: int = 256, split: int = 1) -> Config:
    return Config("gemv", rows, 16, block_k, split, True, 4, 3)


def exact(block_m: int, block_k: int, split: int = 1) -> Config:
    """Sums of unscaled values."""
    return Config("tile", block_m, 64, block_k, split, True, 4, 4)


def rounded(block_m: int, block_k: int, split: int = 1, block_n: int = 128) -> Config:
    """Weights that are scaled and rounded first."""
    return Config("tile", block_m, block_n, block_k, split, False, 8, 3)


INTEGERS = {
    "gemv": Case(CodeCase(1, 35, 256, 128, "zeros", BF16), BF16, gemv(1)),
    "gemv_k_tail_of_one_group": Case(CodeCase(1, 5, 32, 32, scale_dtype=BF16), F16, gemv(1)),
    "gemv_split_k": Case(CodeCase(1, 33, 1088, 64, "zeros"), BF16, gemv(1, 256, 4), True),
    "gemv_two_rows_group_96": Case(CodeCase(2, 19, 480, 96, "zeros", BF16), F16, gemv(2), True),
    "gemv_three_rows_of_four": Case(CodeCase(3, 9, 576, 32, "zeros", F16), BF16, gemv(4, 128, 2)),
    "gemv_rows_of_float32": Case(CodeCase(3, 9, 288, 96, "zeros", F16), F32, gemv(4), True),
    "exact_m_tail_n_tail": Case(CodeCase(7, 67, 256, 128, "zeros"), BF16, exact(16, 128), True),
    "exact_group_32": Case(CodeCase(2, 9, 96, 32, scale_dtype=F16), F16, exact(16, 32)),
    "exact_one_group_split_k": Case(
        CodeCase(17, 65, 1088, 1088, "zeros", BF16), F16, exact(32, 64, 2), True
    ),
    "exact_group_not_a_power_of_two": Case(
        CodeCase(33, 8, 192, 96, "zeros", BF16), BF16, exact(64, 32)
    ),
    "exact_64_rows": Case(CodeCase(64, 64, 128, 64, scale_dtype=BF16), BF16, exact(64, 64)),
    "tile_m_tail_n_tail": Case(
        CodeCase(70, 130, 160, 32, "zeros", BF16), BF16, rounded(64, 32), True
    ),
    "tile_two_bands": Case(CodeCase(130, 1100, 64, 64, scale_dtype=F16), F16, rounded(128, 64)),
    "tile_split_k": Case(CodeCase(66, 40, 512, 64, "zeros", BF16), BF16, rounded(64, 64, 4), True),
    "tile_float32_split_k": Case(CodeCase(5, 70, 512, 128, "zeros"), F32, rounded(32, 32, 2), True),
    "tile_float32_m_tail": Case(CodeCase(34, 12, 64, 64), F32, rounded(32, 32)),
    "more_splits_than_tiles": Case(
        CodeCase(5, 6, 160, 32, "zeros", BF16), BF16, exact(16, 32, 16), True
    ),
    "one_row_of_the_table": Case(CodeCase(1, 20, 1088, 64, "zeros", BF16), BF16, None, True),
    "four_rows_of_the_table": Case(CodeCase(4, 20, 160, 32, "zeros", BF16), F16),
    "sixteen_rows_of_the_table": Case(CodeCase(16, 40, 1024, 128, "zeros", BF16), BF16),
    "seventy_rows_of_the_table": Case(CodeCase(70, 40, 192, 64, "zeros", BF16), BF16),
    "float32_of_the_table": Case(CodeCase(6, 12, 512, 64, "zeros", BF16), F32),
}
BOOKS = {
    "gemv_nf4": Case(CodeCase(1, 35, 256, 64, "nf4", BF16), BF16, gemv(1)),
    "gemv_split_k_row_books": Case(CodeCase(1, 33, 1088, 64, "row"), F16, gemv(1, 256, 4), True),
    "gemv_group_books_k_tail": Case(
        CodeCase(3, 9, 288, 96, "group", None), BF16, gemv(4, 128), True
    ),
    "gemv_float32_books": Case(CodeCase(2, 5, 64, 32, "group", F16), F32, gemv(2)),
    "sums_m_tail_n_tail": Case(
        CodeCase(7, 67, 256, 128, "tensor", BF16), BF16, exact(16, 128), True
    ),
    "sums_row_books_split_k": Case(CodeCase(17, 65, 576, 64, "row"), F16, exact(32, 64, 2)),
    "sums_group_books": Case(CodeCase(5, 9, 192, 96, "group", F16), BF16, exact(16, 32)),
    "no_scales": Case(CodeCase(9, 20, 128, 32, "row", None), BF16, exact(16, 32), True),
    "weights_m_tail": Case(
        CodeCase(70, 66, 160, 32, "tensor", BF16), BF16, rounded(64, 32, 1, 64), True
    ),
    "weights_group_books": Case(CodeCase(66, 40, 256, 64, "group"), F16, rounded(64, 64, 2, 64)),
    "float32_tile_row_books": Case(
        CodeCase(6, 70, 512, 128, "row"), F32, rounded(32, 32, 2, 64), True
    ),
    "one_row_nf4_of_the_table": Case(CodeCase(1, 20, 1088, 64, "nf4", BF16), BF16),
    "four_rows_row_books_of_the_table": Case(CodeCase(4, 20, 160, 32, "row", BF16), F16),
    "sixteen_rows_group_books_of_the_table": Case(CodeCase(16, 40, 1024, 128, "group", BF16), BF16),
    "seventy_rows_nf4_of_the_table": Case(CodeCase(70, 40, 192, 64, "nf4", BF16), BF16),
    "float32_nf4_of_the_table": Case(CodeCase(6, 12, 512, 64, "nf4", BF16), F32),
}
kinds = pytest.mark.parametrize("values", ["zeros", "nf4", "row", "group"])


@pytest.mark.parametrize("case", (INTEGERS | BOOKS).values(), ids=INTEGERS | BOOKS)
def test_matches_float64(case: Case) -> None:
    product = case.product
    weight = product.weight(DEVICE)
    # Rows of x at a distance of more than K, the columns beyond K poisoned.
    wide = torch.full((product.M, product.K + 8), float("nan"), dtype=case.dtype, device=DEVICE)
    x = wide[:, : product.K]
    x.copy_(torch.randn(product.M, product.K))
    bias = torch.randn(product.N, device=DEVICE).to(case.dtype) if case.bias else None
    out = case.multiply(x, weight, bias)
    # Of so few sums, torch's largest error is a matter of luck: 3 instead of 2.
    product.check(out, x, weight, bias, slack=3)
    assert torch.equal(out, case.multiply(x, weight, bias))


@kinds
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_rows_of_x_at_odd_addresses(dtype: torch.dtype, values: str) -> None:
    case = Case(CodeCase(3, 10, 64, 32, values), dtype, gemv(4, 64))
    weight = case.product.weight(DEVICE)
    x = torch.randn(3, 65, device=DEVICE).to(dtype)[:, 1:]
    assert torch.equal(case.multiply(x, weight), case.multiply(x.contiguous(), weight))


@kinds
@pytest.mark.parametrize("M", [1, 3, 20, 65])
def test_unit_vectors_return_the_columns_of_w(M: int, values: str) -> None:
    case = Case(CodeCase(M, 40, 160, 32, values), F32 if values != "zeros" else BF16)
    weight = case.product.weight(DEVICE)
    columns = torch.randperm(160)[:M].to(DEVICE)
    x = torch.zeros(M, 160, dtype=case.dtype, device=DEVICE)
    x[torch.arange(M, device=DEVICE), columns] = 1
    out = case.multiply(x, weight)
    assert torch.equal(out, case.product.dense(weight, case.dtype).t()[columns])


@pytest.mark.parametrize("values", ["zeros", "nf4"])
def test_rows_do_not_depend_on_the_batch_within_a_tier(values: str) -> None:
    case = Case(CodeCase(16, 20, 1024, 128, values, BF16), BF16)
    weight = case.product.weight(DEVICE)
    x = torch.randn(16, 1024, device=DEVICE).to(BF16)
    assert torch.equal(case.multiply(x, weight)[3:8], case.multiply(x[3:8], weight))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("values", ["zeros", "nf4"])
def test_infinity_in_a_row_stays_in_that_row(values: str) -> None:
    case = Case(CodeCase(4, 16, 128, 128, values, BF16), F16)
    weight = case.product.weight(DEVICE)
    x = torch.randn(4, 128, device=DEVICE).to(F16)
    clean = case.multiply(x, weight)
    x[2, 5] = float("inf")
    out = case.multiply(x, weight)
    assert torch.equal(out[[0, 1, 3]], clean[[0, 1, 3]])
    assert not torch.isfinite(out[2]).any()


def test_the_cpu_layout_is_refused_with_a_reason() -> None:
    x, octets = torch.ones(1, 32), torch.zeros(64, 16, dtype=torch.uint8)
    with llmkern.use_backend("triton"):
        with pytest.raises(NotImplementedError, match="cpu layout"):
            ops.lut4_gemm(x, octets, torch.ones(16), group_size=32, layout="cpu")
        octets = torch.zeros(1, 1024, dtype=torch.uint8)
        with pytest.raises(NotImplementedError, match="cpu layout"):
            ops.w4a16_gemm(x, octets, torch.ones(1, 16), group_size=32, layout="cpu")


@pytest.mark.parametrize("values", ["zeros", "row"])
def test_the_cuda_layout_is_refused_with_a_reason(values: str) -> None:
    product = CodeCase(1, 64, 128, 128, values)
    packed = product.pack(product.weight(), kernel=False)
    with llmkern.use_backend("triton"), pytest.raises(NotImplementedError, match="cuda layout"):
        product.multiply(torch.ones(1, 128), packed, None, "cuda")
