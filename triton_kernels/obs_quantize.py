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
from .numerics import narrow, round_even

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


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
def _grid(
    low,
    high,
    fraction,
    TOP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
):
    """Scale and zero point of the range [low, high] * fraction."""
    scale = tl.div_rn((high - low) * fraction, tl.full(low.shape, TOP, tl.float32))
    scale = narrow(scale, SCALE_DTYPE).to(tl.float32)
    scale = tl.where(scale > 0, scale, 1.0)
    if SYMMETRIC:
        zero = tl.full(low.shape, (TOP + 1) // 2, tl.float32)
    else:
        zero = round_even(tl.div_rn(-low * fraction, scale))
        zero = tl.minimum(tl.maximum(zero, 0.0), TOP * 1.0)
    return scale, zero


@triton.jit
def _squared_error(w, scale, zero, TOP: tl.constexpr):
    error = scale[:, None] * (_quantize(w, scale[:, None], zero[:, None], TOP) - zero[:, None]) - w
    return tl.sum(error * error, axis=1)


@triton.jit
def fit_grid(
    group,
    TOP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    CLIP_STEPS: tl.constexpr,
    CLIP_MIN: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
):
    """Scale and zero point of each row of `group`, whose columns outside the group are 0.

    Those zeros change nothing: every range contains 0 and every grid represents it.
    """
    low = tl.minimum(tl.min(group, axis=1), 0.0)
    high = tl.maximum(tl.max(group, axis=1), 0.0)
    if SYMMETRIC:
        high = tl.maximum(-low, high)
        low = -high
    scale, zero = _grid(low, high, 1.0, TOP, SYMMETRIC, SCALE_DTYPE)
    if CLIP_STEPS > 1:
        best = _squared_error(group, scale, zero, TOP)
        for step in range(1, CLIP_STEPS):
            # In float64, then rounded, to be the fraction that Python computes.
            shrink = tl.full((), 1.0 - CLIP_MIN, tl.float64) * step / (CLIP_STEPS - 1)
            fraction = (1.0 - shrink).to(tl.float32)
            candidate, centre = _grid(low, high, fraction, TOP, SYMMETRIC, SCALE_DTYPE)
            error = _squared_error(group, candidate, centre, TOP)
            better = error < best
            best = tl.where(better, error, best)
            scale = tl.where(better, candidate, scale)
            zero = tl.where(better, centre, zero)
    return scale, zero


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
    size,
    GROUP_SIZE: tl.constexpr,
    FIT: tl.constexpr,
    TOP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    CLIP_STEPS: tl.constexpr,
    CLIP_MIN: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Columns 0 .. size-1 of the matrices, whose pointers stand at the block's first column.

    w, codes and w_hat have rows of K elements, U too; error has rows of BLOCK_K. w_hat comes in with the
    updated weights. With FIT every group's grid is computed at its first column, else scales and zeros
    are read.
    """
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    cols = tl.arange(0, BLOCK_K)
    mask_n = rows < N
    mask = mask_n[:, None] & (cols < size)[None, :]
    tile = rows[:, None] * K + cols[None, :]
    grid = rows * (K // GROUP_SIZE)
    work = tl.load(w_hat_ptr + tile, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_K]
    loss = tl.zeros((BLOCK_N,), tl.float32)
    scale = tl.full((BLOCK_N,), 1.0, tl.float32)
    zero = tl.zeros((BLOCK_N,), tl.float32)
    for c in range(size):
        # Loads that the chain does not wait for come first.
        original = tl.load(w_ptr + rows * K + c, mask=mask_n, other=0.0)
        u = tl.load(U_ptr + c * K + cols, mask=(cols > c) & (cols < size), other=0.0)
        d = tl.load(d_ptr + c)
        g = tl.load(g_idx_ptr + c)
        if FIT:
            if c % GROUP_SIZE == 0:
                inside = (cols >= c) & (cols < c + GROUP_SIZE)
                scale, zero = fit_grid(
                    tl.where(inside[None, :], work, 0.0),
                    TOP,
                    SYMMETRIC,
                    CLIP_STEPS,
                    CLIP_MIN,
                    SCALE_DTYPE,
                )
                tl.store(scales_ptr + grid + g, scale, mask=mask_n)
                tl.store(zeros_ptr + grid + g, zero, mask=mask_n)
        else:
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
    dynamic: bool,
    bits: int,
    group_size: int,
    symmetric: bool,
    clip_search: bool,
    scale_dtype: torch.dtype,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    w_hat: torch.Tensor,
    loss: torch.Tensor,
    first: int,
    last: int,
    fit: bool,
    error: torch.Tensor,
    *,
    clip_steps: int,
    clip_min: float,
) -> None:
    """Quantize columns first .. last-1; a LaunchBlock of llmkern/ops/_obs_blocks.py.

    clip_steps and clip_min are the reference's CLIP_STEPS and CLIP_MIN.
    """
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
            last - first,
            GROUP_SIZE=group_size,
            FIT=fit,
            TOP=(1 << bits) - 1,
            SYMMETRIC=symmetric,
            CLIP_STEPS=clip_steps if fit and clip_search else 1,
            CLIP_MIN=clip_min,
            SCALE_DTYPE=DTYPES[scale_dtype],
            BLOCK_N=config.BLOCK_N,
            BLOCK_K=error.shape[1],
            num_warps=config.num_warps,
            enable_fp_fusion=False,
        )
