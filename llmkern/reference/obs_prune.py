"""Specification of obs_prune: SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774) in one-Cholesky form.

The column loop of `llmkern.reference.obs_quantize` with a mask that is chosen on the way. Setting column
k of a row to zero costs (w'_k d_k)^2, which is SparseGPT's w²/[H⁻¹]_kk over the columns not yet visited,
with w' the weights that the loop reaches if it changes nothing in the block being chosen:

    unstructured   for each block of columns, as many of the lowest scores as bring the number removed so
                   far to round(sparsity * number of weights so far), so that the total is exact; out of
                   the N x block scores, or of each row's own
    n:m            the lowest m - n of each group of m columns

A tie goes to the lower column, then to the lower row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmkern.reference.obs_quantize import Grid, column_loop

BLOCK_SIZE = 128  # columns whose unstructured mask is chosen at once


def selection_blocks(K: int, dynamic_group: int | None) -> list[tuple[int, int]]:
    """(first, last) of the blocks of columns whose unstructured mask is chosen at once.

    Blocks of BLOCK_SIZE, cut where a group with a dynamic grid needs it: a group of up to BLOCK_SIZE
    columns lies in one block, and a larger one is a whole number of blocks, the last of them shorter.
    """
    chunk, size = K, BLOCK_SIZE
    if dynamic_group is not None and dynamic_group <= BLOCK_SIZE:
        size = BLOCK_SIZE // dynamic_group * dynamic_group
    elif dynamic_group is not None:
        chunk = dynamic_group
    return [
        (first, min(first + size, start + chunk, K))
        for start in range(0, K, max(chunk, 1))
        for first in range(start, min(start + chunk, K), size)
    ]


def removed_until(column: int, rows: int, sparsity: float) -> int:
    """How many of the rows * column first weights an unstructured mask removes."""
    return round(sparsity * (rows * column))


def keep_all_but_lowest(scores: Tensor, count: int) -> Tensor:
    """bool like `scores` [N, columns]: False for the `count` lowest; ties by column, then by row."""
    flat = scores.t().reshape(-1)
    keep = torch.ones_like(flat, dtype=torch.bool)
    keep[torch.argsort(flat, stable=True)[:count]] = False
    return keep.view(scores.shape[1], scores.shape[0]).t()


def keep_highest_per_row(scores: Tensor, count: int) -> Tensor:
    """bool like `scores` [N, columns]: True for each row's `count` highest, of equal ones the later."""
    order = torch.argsort(scores, dim=1, stable=True)
    keep = torch.zeros_like(scores, dtype=torch.bool)
    return keep.scatter_(1, order[:, scores.shape[1] - count :], True)


@dataclass(frozen=True)
class Unstructured:
    """`sparsity` of all weights, or of each row's if `per_row`, removed block by block."""

    sparsity: float
    per_row: bool
    blocks: dict[int, int]  # first column: last

    def end(self, k: int, rounding: bool) -> int | None:
        return self.blocks.get(k) if rounding else None

    def choose(self, k: int, w: Tensor, d: Tensor) -> Tensor:
        scores = (w * d).square()
        rows, columns = w.shape
        if self.per_row:
            rows = 1
        before = removed_until(k, rows, self.sparsity)
        count = removed_until(k + columns, rows, self.sparsity) - before
        if self.per_row:
            return keep_highest_per_row(scores, columns - count)
        return keep_all_but_lowest(scores, count)


@dataclass(frozen=True)
class OfEvery:
    """`kept` of every `size` columns."""

    kept: int
    size: int

    def end(self, k: int, rounding: bool) -> int | None:
        return None if k % self.size else k + self.size

    def choose(self, k: int, w: Tensor, d: Tensor) -> Tensor:
        return keep_highest_per_row((w * d).square(), self.kept)


def obs_prune(
    w: Tensor,
    U: Tensor,
    d: Tensor,
    mask: Tensor | None,
    sparsity: float,
    kept: int,
    size: int,
    per_row: bool,
    grid: Grid | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The column loop with a mask that is given or chosen, in w's dtype.

    Args:
        w: float [N, K], columns in the order in which they are visited.
        U: float [K, K]; its strict upper triangle is read.
        d: float [K], positive.
        mask: bool [N, K], True = kept, or None to choose it.
        sparsity: fraction to remove if `size` is 0.
        kept, size: columns kept of every `size`, or 0 and 0. A group with a dynamic grid must hold
            whole ones.
        per_row: remove the same number from each row.
        grid: what the kept weights are rounded to, or None.

    Returns:
        mask bool [N, K], codes uint8 [N, K], w_hat [N, K], loss [N].
    """
    keep = torch.ones_like(w, dtype=torch.bool) if mask is None else mask.clone()
    if mask is not None:
        return keep, *column_loop(w, U, d, keep, grid)
    if size:
        return keep, *column_loop(w, U, d, keep, grid, OfEvery(kept, size))
    group = grid.group_size if grid is not None and grid.dynamic else None
    blocks = dict(selection_blocks(w.shape[1], group))
    chosen = Unstructured(sparsity, per_row, blocks)
    return keep, *column_loop(w, U, d, keep, grid, chosen)
