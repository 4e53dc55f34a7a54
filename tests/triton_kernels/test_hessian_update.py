"""The Triton kernel of hessian_update; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from llmkern.triton_kernels import hessian_update as hessian_kernels

import llmkern
from llmkern.ops import hessian_update
from llmkern.reference.hessian_update import hessian_update as reference
from llmkern.testing import assert_matches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("T", "K", "dtype"),
    [
        pytest.param(1, 1, BF16, id="one_element"),
        pytest.param(70, 33, BF16, id="t_tail_k_tail"),
        pytest.param(64, 200, F16, id="several_tiles_of_the_triangle"),
        pytest.param(19, 130, F32, id="float32"),
        pytest.param(4100, 5, BF16, id="more_rows_than_one_sum"),
    ],
)
def test_matches_float64_and_spares_the_upper_triangle(T: int, K: int, dtype: torch.dtype) -> None:
    x = torch.randn(T, K, device=DEVICE).to(dtype)
    H = torch.randn(K, K, device=DEVICE)
    before = H.clone()
    alpha = 2 / (T + 3)
    with llmkern.use_backend("triton"):
        hessian_update(H, x, alpha)
    spec, like = before.double(), before.clone()
    reference(spec, x, alpha)
    reference(like, x, alpha)
    assert torch.equal(H.triu(1), before.triu(1))
    assert_matches(H.tril(), spec.tril(), like.tril())


def test_tiles_of_128(monkeypatch: pytest.MonkeyPatch) -> None:
    # Chosen for a K that takes the interpreter too long.
    config = hessian_kernels.select_config(4096, False)
    assert config.BLOCK_K == 128
    monkeypatch.setattr(hessian_kernels, "select_config", lambda *args: config)
    test_matches_float64_and_spares_the_upper_triangle(70, 140, BF16)


def test_sums_of_many_rows_keep_their_low_bits() -> None:
    # 2^13 rows add up to 2^33, where float32 counts in steps of 1024: the rows of 1 would vanish from
    # one running sum, 64 at a time. They come to 4096 in a sum of their own.
    x = torch.full((8192 + 4096, 1), 1024.0, dtype=BF16, device=DEVICE)
    x[8192:] = 1.0
    H = torch.zeros(1, 1, device=DEVICE)
    with llmkern.use_backend("triton"):
        hessian_update(H, x, 1.0)
    assert H.item() == 2**33 + 4096


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_experts_are_as_each_alone(dtype: torch.dtype) -> None:
    x = torch.randn(90, 70, device=DEVICE).to(dtype)
    offsets = torch.tensor([1, 1, 66, 90], device=DEVICE)
    H, batched = torch.zeros(3, 70, 70, device=DEVICE), torch.zeros(3, 70, 70, device=DEVICE)
    with llmkern.use_backend("triton"):
        hessian_update(H, x, 0.5, offsets)
        hessian_update(batched, x.view(3, 30, 70), 0.5)
        for part, rows in (
            *zip(H, (x[1:1], x[1:66], x[66:]), strict=True),
            *zip(batched, x.split(30), strict=True),
        ):
            alone = torch.zeros(70, 70, device=DEVICE)
            hessian_update(alone, rows, 0.5)
            assert torch.equal(part, alone)


@triton.jit
def lower_tiles_kernel(row_ptr, col_ptr, SIZE: tl.constexpr):
    number = tl.arange(0, SIZE)
    row, col = hessian_kernels.lower_tile(number)
    tl.store(row_ptr + number, row)
    tl.store(col_ptr + number, col)


def test_every_tile_of_the_triangle_is_found() -> None:
    size = 1 << 17  # tiles of K = 65536 by 128
    rows = torch.empty(size, dtype=torch.int32, device=DEVICE)
    cols = torch.empty_like(rows)
    lower_tiles_kernel[(1,)](rows, cols, size)
    want_rows, want_cols = torch.tril_indices(512, 512, dtype=torch.int32, device=DEVICE)
    assert torch.equal(rows, want_rows[:size])
    assert torch.equal(cols, want_cols[:size])
