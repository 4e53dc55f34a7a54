"""Which weights of a block of columns obs_prune removes; the loop itself is obs_quantize.py's kernel.

The lowest costs (w' d)^2 of the N x columns of an expert, or of each row; ties by column, then by row,
exactly. Of each row: every cost is ranked against the others. Of a whole block: a radix select. Costs are
not negative, so their bits order like them; keys are written column by column, the order of ties. Three
passes count 11, 10 and 10 bits and give the key T of the first cost that is kept; the keys below T go,
and of those equal to T the first so many. Counts are integers: the order of the atomic additions does
not matter. Bound by latency: five small grids over data that stay in L2.

Run in Triton's interpreter and compiled ahead of time for sm_80 and sm_90; not yet run on a GPU.
"""

import torch
import triton
import triton.language as tl

from .device import on_device

ROWS = 32  # per program of the first pass, and of the choice in each row
STRETCH = 4096  # keys per program of the others
COUNTS = 2048 + 1024 + 1024  # of the three digits; ties per program follow


@triton.jit
def _costs(reached_ptr, d_ptr, d_stride, expert, rows, cols, N, columns):
    """(reached * d)^2, infinite outside the matrix: [rows, cols]."""
    inside = (rows < N)[:, None] & (cols < columns)[None, :]
    at = (expert * N + rows)[:, None] * columns + cols[None, :]
    d = tl.load(d_ptr + expert * d_stride + cols, mask=cols < columns, other=0.0)
    scaled = tl.load(reached_ptr + at, mask=inside, other=0.0) * d[None, :]
    return tl.where(inside, scaled * scaled, float("inf")), inside


@triton.jit
def select_rows_kernel(
    reached_ptr,
    d_ptr,
    mask_ptr,
    N,
    columns,
    d_stride,
    mask_stride,
    removed,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    expert = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLUMNS)
    costs, inside = _costs(reached_ptr, d_ptr, d_stride, expert, rows, cols, N, columns)
    cheaper = tl.zeros((ROWS, COLUMNS), tl.int32)
    for j in range(columns):
        other = tl.sum(tl.where((cols == j)[None, :], costs, 0.0), axis=1)[:, None]
        cheaper += ((other < costs) | ((other == costs) & (cols > j)[None, :])).to(tl.int32)
    at = (expert * N + rows)[:, None] * mask_stride + cols[None, :]
    tl.store(mask_ptr + at, (cheaper >= removed).to(tl.uint8), mask=inside)


@triton.jit
def _count(counts_ptr, digits, BINS: tl.constexpr, mask):
    """Add one to the count of each digit."""
    counts = tl.histogram(digits, BINS, mask=mask)
    tl.atomic_add(counts_ptr + tl.arange(0, BINS), counts, mask=counts > 0)


@triton.jit
def select_keys_kernel(
    reached_ptr,
    d_ptr,
    keys_ptr,
    counts_ptr,
    N,
    columns,
    d_stride,
    counts_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Keys, column by column, and the counts of their first digit."""
    expert = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLUMNS)
    costs, inside = _costs(reached_ptr, d_ptr, d_stride, expert, rows, cols, N, columns)
    keys = costs.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    at = (expert * columns + cols)[None, :] * N + rows[:, None]
    tl.store(keys_ptr + at, keys, mask=inside)
    digits, valid = tl.ravel(keys >> 20), tl.ravel(inside)
    _count(counts_ptr + expert * counts_stride, digits, 2048, valid)


@triton.jit
def _find(counts_ptr, rank, BINS: tl.constexpr):
    """The digit of the key of rank `rank`, and its rank among the keys that have that digit."""
    counts = tl.load(counts_ptr + tl.arange(0, BINS))
    end = tl.cumsum(counts, axis=0)
    hit = (end - counts <= rank) & (rank < end)
    digit = tl.sum(tl.where(hit, tl.arange(0, BINS), 0), axis=0)
    return digit, rank - tl.sum(tl.where(hit, end - counts, 0), axis=0)


@triton.jit
def _prefix(counts_ptr, rank, DIGITS: tl.constexpr):
    """The first DIGITS digits of the key of rank `rank`, and its rank among those that share them."""
    digit, rank = _find(counts_ptr, rank, 2048)
    key = digit << 20
    if DIGITS > 1:
        digit, rank = _find(counts_ptr + 2048, rank, 1024)
        key |= digit << 10
    if DIGITS > 2:
        digit, rank = _find(counts_ptr + 3072, rank, 1024)
        key |= digit
    return key, rank


@triton.jit
def select_stretch_kernel(
    keys_ptr,
    mask_ptr,
    counts_ptr,
    N,
    size,
    mask_stride,
    counts_stride,
    removed,
    STEP: tl.constexpr,
    STRETCH: tl.constexpr,
):
    """STEP 1 and 2: counts of that digit among the keys like T so far; 3: of T; 4: the mask."""
    stretch, expert = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = stretch.to(tl.int64) * STRETCH + tl.arange(0, STRETCH)
    inside = at < size
    keys = tl.load(keys_ptr + expert * size + at, mask=inside, other=0x7FFFFFFF)
    counts_ptr += expert * counts_stride
    if STEP == 1:
        key, rank = _prefix(counts_ptr, removed, 1)
        alike = inside & ((keys ^ key) >> 20 == 0)
        _count(counts_ptr + 2048, (keys >> 10) & 1023, 1024, alike)
    elif STEP == 2:
        key, rank = _prefix(counts_ptr, removed, 2)
        alike = inside & ((keys ^ key) >> 10 == 0)
        _count(counts_ptr + 3072, keys & 1023, 1024, alike)
    else:
        key, rank = _prefix(counts_ptr, removed, 3)
        ties = (inside & (keys == key)).to(tl.int32)
        if STEP == 3:
            tl.store(counts_ptr + 4096 + stretch, tl.sum(ties, axis=0))
        else:
            before = tl.cumsum(ties, axis=0) - ties
            for first in range(0, stretch, 128):
                others = first + tl.arange(0, 128)
                before += tl.sum(
                    tl.load(counts_ptr + 4096 + others, mask=others < stretch, other=0), axis=0
                )
            keep = (keys > key) | ((keys == key) & (before >= rank))
            to = (expert * N + at % N) * mask_stride + at // N
            tl.store(mask_ptr + to, keep.to(tl.uint8), mask=inside)


def select(
    reached: torch.Tensor, d: torch.Tensor, removed: int, per_row: bool, mask: torch.Tensor
) -> None:
    """A Select of llmkern/ops/_obs_blocks.py; allocates the block's keys and their counts."""
    E, N, columns = reached.shape
    reached, to = reached.contiguous(), mask.view(torch.uint8)
    tile = {"ROWS": ROWS, "COLUMNS": triton.next_power_of_2(columns)}
    strides = (d.stride(0), mask.stride(1))
    exact = {"enable_fp_fusion": False}
    with on_device(d):
        if per_row:
            grid: tuple[int, int] = (triton.cdiv(N, ROWS), E)
            sizes = (N, columns, *strides, removed)
            select_rows_kernel[grid](reached, d, to, *sizes, **tile, **exact)
            return
        size = N * columns
        stretches = triton.cdiv(size, STRETCH)
        keys = torch.empty(E, size, dtype=torch.int32, device=d.device)
        counts = torch.zeros(E, COUNTS + stretches, dtype=torch.int32, device=d.device)
        grid, sizes = (triton.cdiv(N, ROWS), E), (N, columns, strides[0], counts.shape[1])
        select_keys_kernel[grid](reached, d, keys, counts, *sizes, **tile, **exact)
        rest = (N, size, strides[1], counts.shape[1], removed)
        for step in (1, 2, 3, 4):
            select_stretch_kernel[(stretches, E)](
                keys, to, counts, *rest, STEP=step, STRETCH=STRETCH, num_warps=8
            )
