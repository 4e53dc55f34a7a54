"""obs_quantize, one block of columns: the inner loop of llmkern/reference/obs_quantize.py.

Rows are independent. A program keeps BLOCK_N rows of the block in registers and walks its columns one by
one: take the column out, round it to the group's grid, add error * U[column, later] to the columns still
to come. Bound by the latency of that chain; the arithmetic is N * 128^2 multiply-adds and the traffic a
few tiles. The errors go to llmkern/ops/_obs_blocks.py, which pushes them onto the later blocks.

Divisions are exact and ties round to even, as in the reference. Multiplications and additions are fused
only where this says fma: a fused code - error would flip a few codes.

Run in Triton's interpreter and compiled ahead of time for sm_80 and sm_90; not yet run on a GPU.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .device import DEFAULT_SMS, num_sms, on_device
from .numerics import round_even


@dataclass(frozen=True)
class Config:
    BLOCK_N: int
    num_warps: int


def select_config(N: int, num_sms: int = DEFAULT_SMS) -> Config:
    """Rows per program: as many as still give every multiprocessor a program."""
    for block_n in (16, 8):
        if block_n * num_sms <= N:
            return Config(block_n, 4)
    return Config(4, 4)


@triton.jit
def _quantize(w, scale, zero, TOP: tl.constexpr):
    """Codes, as floats, of w on the grid scale * (code - zero)."""
    # round_even is off only where the clamp decides anyway.
    code = round_even(tl.div_rn(w, scale)) + zero
    return tl.minimum(tl.maximum(code, 0.0), TOP * 1.0)


@triton.jit
def obs_quantize_kernel(
    w_ptr,
    U_ptr,
    d_ptr,
    g_idx_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    w_hat_ptr,
    loss_ptr,
    error_ptr,
    N,
    K,
    groups,
    size,
    TOP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Columns 0 .. size-1 of the matrices, whose pointers stand at the block's first column.

    w, codes and w_hat have rows of K elements, U too; scales and zeros have rows of `groups`, error of
    BLOCK_K. w_hat comes in with the updated weights.
    """
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    cols = tl.arange(0, BLOCK_K)
    mask_n = rows < N
    mask = mask_n[:, None] & (cols < size)[None, :]
    tile = rows[:, None] * K + cols[None, :]
    grid = rows * groups
    work = tl.load(w_hat_ptr + tile, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_K]
    loss = tl.zeros((BLOCK_N,), tl.float32)
    for c in range(size):
        # Loads that the chain does not wait for come first.
        original = tl.load(w_ptr + rows * K + c, mask=mask_n, other=0.0)
        u = tl.load(U_ptr + c * K + cols, mask=(cols > c) & (cols < size), other=0.0)
        d = tl.load(d_ptr + c)
        g = tl.load(g_idx_ptr + c)
        scale = tl.load(scales_ptr + grid + g, mask=mask_n, other=1.0)
        zero = tl.load(zeros_ptr + grid + g, mask=mask_n, other=0.0)
        here = (cols == c)[None, :]
        updated = tl.sum(tl.where(here, work, 0.0), axis=1)
        code = _quantize(updated, scale, zero, TOP)
        value = scale * (code - zero)
        tl.store(codes_ptr + rows * K + c, code.to(tl.uint8), mask=mask_n)
        residual = (updated - value) * d
        loss += residual * residual
        work = tl.fma((original - value)[:, None], u[None, :], work)
        work = tl.where(here, value[:, None], work)
    error = tl.load(w_ptr + tile, mask=mask, other=0.0) - work
    tl.store(error_ptr + rows[:, None] * BLOCK_K + cols[None, :], error, mask=mask)
    tl.store(w_hat_ptr + tile, work, mask=mask)
    loss += tl.load(loss_ptr + rows, mask=mask_n, other=0.0)
    tl.store(loss_ptr + rows, loss, mask=mask_n)


def launch_block(
    w: torch.Tensor,
    U: torch.Tensor,
    d: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    w_hat: torch.Tensor,
    loss: torch.Tensor,
    first: int,
    last: int,
    error: torch.Tensor,
) -> None:
    """Quantize columns first .. last-1; a LaunchBlock of llmkern/ops/_obs_blocks.py."""
    N, K = w.shape
    config = select_config(N, num_sms(w))
    with on_device(w):
        obs_quantize_kernel[(triton.cdiv(N, config.BLOCK_N),)](
            w[:, first:],
            U[first:, first:],
            d[first:],
            g_idx[first:],
            codes[:, first:],
            scales,
            zeros,
            w_hat[:, first:],
            loss,
            error,
            N,
            K,
            scales.shape[1],
            last - first,
            TOP=(1 << bits) - 1,
            BLOCK_N=config.BLOCK_N,
            BLOCK_K=error.shape[1],
            num_warps=config.num_warps,
            enable_fp_fusion=False,
        )
