"""obs_quantize and obs_prune, one block of columns: the loop of llmkern/reference/obs_quantize.py.

Rows are independent. A program keeps BLOCK_N rows of the block in registers and walks its columns one by
one: take the column out, round it to the group's grid (integers, a book of 16, or nothing) or set it to
zero where the mask says, add error * U[column, later] to the columns still to come. For n:m it first
walks each group of columns without changing any, to see what each would cost. Bound by the latency of
that chain; the arithmetic is N * 128^2 multiply-adds and the traffic a few tiles. The errors go to
llmkern/ops/_obs_blocks.py, which pushes them onto the later blocks.

Divisions are exact and ties go as in the reference. Multiplications and additions are fused only where
this says fma: a fused code - error would flip a few codes.

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


def select_config(N: int, num_sms: int = DEFAULT_SMS, size: int = 0) -> Config:
    """Rows per program: as many as still give every multiprocessor a program.

    At most 8 if a mask is chosen among more than 4 columns, which 16 rows would spill registers for.
    """
    for block_n in (8,) if size > 4 else (16, 8):
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
def _nearest(w, scale, book_ptrs, mask_n):
    """Rank of the entry of each row's ascending book that is nearest to w / scale, and scale * entry.

    A tie goes to the smaller entry: the rank is the number of middles below.
    """
    number = tl.arange(0, 16)[None, :]
    entries = tl.load(book_ptrs[:, None] + number, mask=mask_n[:, None], other=0.0)
    inner = mask_n[:, None] & (number < 15)
    above = tl.load(book_ptrs[:, None] + number + 1, mask=inner, other=0.0)
    below = inner & ((entries + above) * 0.5 < tl.div_rn(w, scale)[:, None])
    rank = tl.sum(below.to(tl.int32), axis=1)
    return rank, scale * tl.sum(tl.where(number == rank[:, None], entries, 0.0), axis=1)


@triton.jit
def _column(tile, here):
    """The column of tile [BLOCK_N, BLOCK_K] where `here` [1, BLOCK_K] is true."""
    return tl.sum(tl.where(here, tile, 0.0), axis=1)


@triton.jit
def _choose(
    work, w_ptrs, U_ptr, d_ptr, mask_n, cols, K, size, c, KEPT: tl.constexpr, SIZE: tl.constexpr
):
    """Which of the SIZE columns from c on are kept: [BLOCK_N, 8], of 1 and 0.

    Those that cost the most, (w' d)^2 with w' the weights reached if none of them is changed; of equal
    ones the later.
    """
    number = tl.arange(0, 8)
    costs = tl.zeros((work.shape[0], 8), tl.float32)
    for j in tl.static_range(SIZE):
        reached = _column(work, (cols == c + j)[None, :])
        original = tl.load(w_ptrs + c + j, mask=mask_n, other=0.0)
        later = (cols > c + j) & (cols < size)
        u = tl.load(U_ptr + (c + j) * K + cols, mask=later, other=0.0)
        work = tl.fma((original - reached)[:, None], u[None, :], work)
        scaled = reached * tl.load(d_ptr + c + j)
        costs = tl.where((number == j)[None, :], (scaled * scaled)[:, None], costs)
    first = (number[None, :] < number[:, None])[None, :, :]
    other, mine = costs[:, None, :], costs[:, :, None]
    cheaper = (other < mine) | ((other == mine) & first)
    counted = cheaper & (number < SIZE)[None, None, :]
    return (tl.sum(counted.to(tl.int32), axis=2) >= SIZE - KEPT).to(tl.int32)


@triton.jit
def obs_block_kernel(
    w_ptr,
    U_ptr,
    d_ptr,
    g_idx_ptr,
    book_ptr,
    scales_ptr,
    zeros_ptr,
    mask_ptr,
    codes_ptr,
    work_ptr,
    loss_ptr,
    error_ptr,
    N,
    K,
    groups,
    book_expert,
    book_row,
    book_group,
    work_stride,
    size,
    TOP: tl.constexpr,
    KEPT: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Columns 0 .. size-1 of the matrices, whose pointers stand at the block's first column.

    w, U, mask and codes have rows of K elements; scales and zeros have rows of `groups`, work of
    work_stride, error of BLOCK_K. work comes in with the updated weights. Without codes nothing is
    rounded; without book_ptr to integers. With SIZE the mask is chosen and written, else read.
    """
    expert = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    cols = tl.arange(0, BLOCK_K)
    mask_n = rows < N
    mask = mask_n[:, None] & (cols < size)[None, :]
    book_rows = expert * book_expert + rows * book_row
    rows += expert * N
    U_ptr += expert * K * K
    d_ptr += expert * K
    tile = rows[:, None] * K + cols[None, :]
    work_ptrs = work_ptr + rows[:, None] * work_stride + cols[None, :]
    work = tl.load(work_ptrs, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_K]
    loss = tl.zeros((BLOCK_N,), tl.float32)
    bits = tl.zeros((BLOCK_N,), tl.int32)  # the group's mask, a bit per column
    for c in range(size):
        # Loads that the chain does not wait for come first.
        original = tl.load(w_ptr + rows * K + c, mask=mask_n, other=0.0)
        u = tl.load(U_ptr + c * K + cols, mask=(cols > c) & (cols < size), other=0.0)
        d = tl.load(d_ptr + c)
        here = (cols == c)[None, :]
        updated = _column(work, here)
        value = updated
        if SIZE > 0:
            if c % SIZE == 0:
                keep = _choose(
                    work, w_ptr + rows * K, U_ptr, d_ptr, mask_n, cols, K, size, c, KEPT, SIZE
                )
                bits = tl.sum(keep << tl.arange(0, 8)[None, :], axis=1)
            kept = ((bits >> (c % SIZE)) & 1) != 0
            tl.store(mask_ptr + rows * K + c, kept.to(tl.uint8), mask=mask_n)
            value = tl.where(kept, value, 0.0)
        elif mask_ptr is not None:
            kept = tl.load(mask_ptr + rows * K + c, mask=mask_n, other=1) != 0
            value = tl.where(kept, value, 0.0)
        if codes_ptr is not None:
            g = tl.load(g_idx_ptr + expert * K + c)
            scale = tl.load(scales_ptr + rows * groups + g, mask=mask_n, other=1.0)
            if book_ptr is not None:
                book = book_ptr + book_rows + g * book_group
                code, value = _nearest(value, scale, book, mask_n)
            else:
                zero = tl.load(zeros_ptr + rows * groups + g, mask=mask_n, other=0.0)
                code = _quantize(value, scale, zero, TOP)
                value = scale * (code - zero)
            tl.store(codes_ptr + rows * K + c, code.to(tl.uint8), mask=mask_n)
            if SIZE > 0 or mask_ptr is not None:
                value = tl.where(kept, value, 0.0)
        residual = (updated - value) * d
        loss += residual * residual
        work = tl.fma((original - value)[:, None], u[None, :], work)
        work = tl.where(here, value[:, None], work)
    error = tl.load(w_ptr + tile, mask=mask, other=0.0) - work
    tl.store(error_ptr + rows[:, None] * BLOCK_K + cols[None, :], error, mask=mask)
    tl.store(work_ptrs, work, mask=mask)
    if loss_ptr is not None:
        loss += tl.load(loss_ptr + rows, mask=mask_n, other=0.0)
        tl.store(loss_ptr + rows, loss, mask=mask_n)


def launch_block(
    w: torch.Tensor,
    U: torch.Tensor,
    d: torch.Tensor,
    grid: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor] | None,
    book_strides: tuple[int, int, int],
    bits: int,
    mask: torch.Tensor | None,
    kept: int,
    size: int,
    codes: torch.Tensor | None,
    work: torch.Tensor,
    loss: torch.Tensor | None,
    error: torch.Tensor,
    first: int,
    last: int,
    work_first: int,
) -> None:
    """Take columns first .. last-1 through the loop: a Block of llmkern/ops/_obs_blocks.py.

    grid is g_idx, codebook, scales and zeros, or None with codes None.
    """
    E, N, K = w.shape
    g_idx, book, scales, zeros = grid if grid is not None else (None, None, None, None)
    config = select_config(N * E, num_sms(w), size)
    with on_device(w):
        obs_block_kernel[(triton.cdiv(N, config.BLOCK_N), E)](
            w[..., first:],
            U[:, first:, first:],
            d[:, first:],
            None if g_idx is None else g_idx[:, first:],
            book,
            scales,
            zeros,
            None if mask is None else mask[..., first:].view(torch.uint8),
            None if codes is None else codes[..., first:],
            work[..., work_first:],
            loss,
            error,
            N,
            K,
            0 if scales is None else scales.shape[2],
            *book_strides,
            work.shape[2],
            last - first,
            TOP=(1 << bits) - 1,
            KEPT=kept,
            SIZE=size,
            BLOCK_N=config.BLOCK_N,
            BLOCK_K=error.shape[2],
            num_warps=config.num_warps,
            enable_fp_fusion=False,
        )
