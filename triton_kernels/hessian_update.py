"""hessian_update: H[i, j] += alpha * sum_t x[t, i] * x[t, j] for j <= i, in place, for each expert.

Bound by the tensor cores: T * K^2 multiply-adds for the lower half. A program owns one square tile on or
below the diagonal and sums over all rows of x, so nothing is added atomically and results repeat bit
for bit. bfloat16 and float16 products are exact in the float32 accumulator, which is emptied into a
second one every FLUSH rows so that rounding does not grow with T; float32 x is multiplied in float32,
never through TF32. alpha multiplies the finished sums.

Run in Triton's interpreter and compiled ahead of time for sm_80 and sm_90; not yet run on a GPU.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .device import DEFAULT_SMS, num_sms, on_device
from .numerics import dot


@dataclass(frozen=True)
class Config:
    BLOCK_K: int  # side of a tile of H
    BLOCK_T: int  # rows of x per step
    FLUSH: int  # rows of x per first-level sum
    num_warps: int
    num_stages: int


def select_config(K: int, float32: bool, num_sms: int = DEFAULT_SMS, experts: int = 1) -> Config:
    """Tile of H for K columns; `float32` is whether x is. Small K gets small tiles, to fill the GPU."""
    if float32:
        return Config(64, 16, 4096, 4, 2)
    tiles = -(-K // 128)
    if experts * (tiles * (tiles + 1) // 2) < num_sms:
        return Config(64, 64, 4096, 4, 3)
    return Config(128, 64, 4096, 8, 3)


@triton.jit
def lower_tile(number):
    """(row, column) of a tile of the lower triangle; number = row (row + 1) / 2 + column."""
    row = ((tl.sqrt(8.0 * number.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The square root may be off by one.
    row -= (row * (row + 1) // 2 > number).to(tl.int32)
    row += ((row + 1) * (row + 2) // 2 <= number).to(tl.int32)
    return row, number - row * (row + 1) // 2


@triton.jit
def hessian_update_kernel(
    H_ptr,
    x_ptr,
    offsets_ptr,
    T,
    K,
    alpha,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    FLUSH: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Expert e has the T rows of x from e * T on; with offsets_ptr, those it says, of T in all."""
    i, j = lower_tile(tl.program_id(0))
    expert = tl.program_id(1).to(tl.int64)
    begin = expert * T
    end = begin + T
    if offsets_ptr is not None:
        begin = tl.maximum(tl.load(offsets_ptr + expert), 0)
        end = tl.minimum(tl.load(offsets_ptr + expert + 1), T)
    rows = i * BLOCK_K + tl.arange(0, BLOCK_K)
    cols = j * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
    for start in range(begin, end, FLUSH):
        acc = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
        for t in tl.range(start, tl.minimum(start + FLUSH, end), BLOCK_T, num_stages=NUM_STAGES):
            offs_t = (t + tl.arange(0, BLOCK_T)).to(tl.int64)
            mask_t = (offs_t < end)[:, None]
            left = tl.load(
                x_ptr + offs_t[:, None] * K + rows[None, :],
                mask=mask_t & (rows < K)[None, :],
                other=0.0,
            )  # [BLOCK_T, BLOCK_K]
            right = tl.load(
                x_ptr + offs_t[:, None] * K + cols[None, :],
                mask=mask_t & (cols < K)[None, :],
                other=0.0,
            )
            acc = dot(tl.trans(left), right, acc)
        total += acc
    H_ptrs = H_ptr + expert * K * K + rows.to(tl.int64)[:, None] * K + cols[None, :]
    mask = (rows < K)[:, None] & (cols[None, :] <= rows[:, None])
    tl.store(H_ptrs, tl.fma(total, alpha, tl.load(H_ptrs, mask=mask, other=0.0)), mask=mask)


def launch(H: torch.Tensor, x: torch.Tensor, alpha: float, offsets: torch.Tensor | None) -> None:
    """Add alpha * xᵀx to the lower triangle of H; arguments as in llmkern.ops.hessian_update."""
    T, K = x.shape[-2:]
    experts = H.shape[0] if H.dim() == 3 else 1
    config = select_config(K, x.dtype == torch.float32, num_sms(x), experts)
    tiles = triton.cdiv(K, config.BLOCK_K)
    with on_device(x):
        hessian_update_kernel[(tiles * (tiles + 1) // 2, experts)](
            H,
            x,
            offsets,
            T,
            K,
            alpha,
            BLOCK_K=config.BLOCK_K,
            BLOCK_T=config.BLOCK_T,
            FLUSH=config.FLUSH,
            NUM_STAGES=config.num_stages,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
        )
