"""The Triton kernels of the 2:4 sparse products; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from llmkern.triton_kernels import sparse24_gemm, sparse24_w4a16_gemm
from llmkern.triton_kernels.configs import Config
from torch import Tensor

import llmkern
from llmkern.formats.int4 import pack_zeros
from llmkern.formats.sparse24 import NIBBLES, compress_codes
from llmkern.testing import Sparse24Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
kinds = pytest.mark.parametrize("group_size", [None, 32], ids=["values", "codes"])


@dataclass(frozen=True)
class Case(Sparse24Case):
    dtype: torch.dtype = BF16
    config: Config | None = None
    bias: bool = False


def gemv(rows: int, block_k: int = 256, split: int = 1) -> Config:
    return Config("gemv", rows, 16, block_k, split, True, 4, 3)


def tile(block_m: int, block_k: int, split: int = 1, exact: bool = True) -> Config:
    return Config("tile", block_m, 64, block_k, split, exact, 4, 3)


CASES = {
    "one_row_k_tail": Case(1, 35, 136, dtype=BF16, config=tile(16, 64)),
    "k_shorter_than_a_tile": Case(7, 5, 8, dtype=F16, config=tile(16, 64), bias=True),
    "split_k_tail": Case(17, 65, 712, dtype=BF16, config=tile(32, 64, 4), bias=True),
    "two_bands": Case(130, 600, 72, dtype=F16, config=tile(128, 64)),
    "gemv_float32_k_tail": Case(1, 19, 264, dtype=F32, config=gemv(1), bias=True),
    "gemv_float32_three_rows_split": Case(3, 33, 584, dtype=F32, config=gemv(4, 128, 2)),
    "tile_float32": Case(34, 12, 72, dtype=F32, config=tile(32, 32), bias=True),
    "one_row_of_the_table": Case(1, 20, 1096, dtype=BF16, bias=True),
    "seventy_rows_of_the_table": Case(70, 40, 192, dtype=F16),
    "float32_of_the_table": Case(6, 12, 520, dtype=F32),
    "codes_one_row": Case(1, 35, 256, 128, False, BF16, config=tile(16, 128), bias=True),
    "codes_g32_zeros": Case(2, 9, 96, 32, False, F16, dtype=F16, config=tile(16, 32)),
    "codes_one_group_split_k": Case(17, 65, 1088, 1088, dtype=F16, config=tile(32, 64, 2)),
    "codes_group_of_96": Case(33, 8, 192, 96, False, BF16, config=tile(64, 32), bias=True),
    "codes_rounded": Case(70, 130, 160, 32, False, dtype=BF16, config=tile(64, 32, 1, False)),
    "codes_rounded_split": Case(66, 40, 512, 64, dtype=F16, config=tile(64, 64, 4, False)),
    "codes_gemv_float32": Case(3, 19, 480, 96, False, dtype=F32, config=gemv(4), bias=True),
    "codes_tile_float32": Case(5, 70, 512, 128, dtype=F32, config=tile(32, 32, 2, False)),
    "codes_of_the_table": Case(4, 20, 160, 32, False, dtype=BF16),
    "codes_70_rows_of_the_table": Case(70, 40, 192, 64, dtype=BF16),
    "codes_float32_of_the_table": Case(2, 12, 512, 64, dtype=F32),
}


def on_device(weight: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    return tuple(None if t is None else t.to(DEVICE) for t in weight)


def multiply(case: Case, x: Tensor, weight: tuple[Any, ...], bias: Tensor | None) -> Tensor:
    """The product by the op, or by the kernel that the case asks for."""
    if case.config is None:
        with llmkern.use_backend("triton"):
            return case.multiply(x, weight, bias)
    out = torch.full((case.M, case.N), float("nan"), dtype=case.dtype, device=DEVICE)
    if case.group_size is None:
        sparse24_gemm.launch(x, *weight, bias, "canonical", out, case.config)
    else:
        args = (*weight, bias, case.group_size, "canonical", out, case.config)
        sparse24_w4a16_gemm.launch(x, *args)
    return out


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_float64(case: Case) -> None:
    weight = on_device(case.weight(case.dtype))
    # Rows of x at a distance of more than K, the columns beyond K poisoned.
    x = torch.full((case.M, case.K + 8), float("nan"), dtype=case.dtype, device=DEVICE)[:, : case.K]
    x.copy_(torch.randn(case.M, case.K))
    bias = torch.randn(case.N, device=DEVICE).to(case.dtype) if case.bias else None
    out = multiply(case, x, weight, bias)
    case.check(out, x, weight, bias)
    assert torch.equal(out, multiply(case, x, weight, bias)), "two runs differ"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@kinds
def test_unit_vectors_return_every_pattern_bit_for_bit(
    group_size: int | None, dtype: torch.dtype
) -> None:
    """Group g of row n keeps pattern (n + g) mod 6."""
    case = Sparse24Case(20, 12, 160, group_size, False)
    which = (torch.arange(case.N)[:, None] + torch.arange(case.K // 4)) % 6
    nibbles = torch.tensor(NIBBLES, dtype=torch.uint8)[which]
    first, _, *grids = case.weight(dtype)
    weight = on_device((first, nibbles[:, ::2] | nibbles[:, 1::2] << 4, *grids))
    dense = case.dense(weight, dtype)
    with llmkern.use_backend("triton"):
        for rows in torch.eye(case.K, dtype=dtype, device=DEVICE).split(case.M):
            assert torch.equal(case.multiply(rows, weight).t(), dense @ rows.t())


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_kept_code_0_is_not_pruned(kept: int) -> None:
    case = Sparse24Case(16, 8, 32, 32, False)
    mask = torch.zeros(case.N, case.K // 4, 4, dtype=torch.bool)
    mask[..., :kept] = True
    mask = mask[..., torch.randperm(4)].flatten(1)
    points = torch.full((case.N, 1), 3, dtype=torch.uint8)
    codes = torch.zeros(case.N, case.K, dtype=torch.uint8)
    parts = *compress_codes(codes, mask, points), torch.ones(case.N, 1), pack_zeros(points, 4)
    with llmkern.use_backend("triton"):
        out = case.multiply(torch.eye(case.K, device=DEVICE).to(BF16)[:16], on_device(parts))
    assert torch.equal(out.t().cpu(), -3 * mask.to(BF16)[:, :16])


def test_values_at_odd_addresses() -> None:
    case = Sparse24Case(3, 10, 64)
    values, meta = on_device(case.weight(BF16))
    padded = torch.empty(values.numel() + 1, dtype=BF16, device=DEVICE)
    moved = padded[1:].view(values.shape).copy_(values)
    x = torch.randn(3, 64, device=DEVICE).to(BF16)
    with llmkern.use_backend("triton"):
        assert torch.equal(case.multiply(x, (moved, meta)), case.multiply(x, (values, meta)))


@pytest.mark.slow
@kinds
def test_rows_do_not_depend_on_the_batch_within_a_tier(group_size: int | None) -> None:
    case = Sparse24Case(16, 20, 1024, group_size)
    weight = on_device(case.weight(BF16))
    x = torch.randn(16, case.K, device=DEVICE).to(BF16)
    with llmkern.use_backend("triton"):
        whole = case.multiply(x, weight)
        assert torch.equal(whole[3:8], case.multiply(x[3:8], weight))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, in the interpreter
@kinds
def test_infinity_in_a_row_stays_in_that_row(group_size: int | None) -> None:
    case = Sparse24Case(4, 16, 128, group_size)
    weight = on_device(case.weight(F16))
    x = torch.randn(4, case.K, device=DEVICE).to(F16)
    with llmkern.use_backend("triton"):
        clean = case.multiply(x, weight)
        x[2, 4:8] = float("inf")
        out = case.multiply(x, weight)
    assert torch.equal(out[[0, 1, 3]], clean[[0, 1, 3]])
    assert not torch.isfinite(out[2]).any()
