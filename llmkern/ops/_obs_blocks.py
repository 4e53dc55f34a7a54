"""The column loop of obs_quantize and obs_prune by blocks of columns, for the GPU backends.

A kernel takes a block of columns through the loop and returns their errors E = w - w_hat; one matrix
product per block then pushes them onto all later columns: work[..., last:] += E @ U[first:last, last:].
The working matrix lies in w_hat: columns before the block hold results, the others hold w' of
`llmkern.reference.obs_quantize`. Before a block, what `llmkern.reference.obs_prune` decides then is
decided: unstructured masks, and the grids of dynamic groups. Everything is done for all experts at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmkern.reference.obs_prune import BLOCK_SIZE, removed_until, selection_blocks
from llmkern.reference.obs_quantize import group_grid, unrounded


@dataclass(frozen=True)
class BlockGrid:
    """What a block is rounded to; as the ops take it.

    Attributes:
        g_idx: int32 [E, K].
        codebook: float32 [E or 1, N or 1, groups or 1, 16], ascending, or None for integers.
        scales, zeros: float32 [E, N, groups].
        bits: of the integers.
        codes: uint8 [E, N, K], written.
    """

    g_idx: Tensor
    codebook: Tensor | None
    scales: Tensor
    zeros: Tensor
    bits: int
    codes: Tensor

    def book_strides(self) -> tuple[int, int, int]:
        """Of the codebook along experts, rows and groups; 0 where it is the same."""
        if self.codebook is None:
            return 0, 0, 0
        sizes, strides = self.codebook.shape, self.codebook.stride()
        expert, row, group = (
            0 if size == 1 else stride for size, stride in zip(sizes[:3], strides[:3], strict=True)
        )
        return expert, row, group


@dataclass(frozen=True)
class Block:
    """Columns first..last-1 of the loop, for a kernel.

    Attributes:
        w, U, d: float32 [E, N, K], [E, K, K] and [E, K].
        work: float32 [E, N, columns]; from column `work_first` on the block's updated weights, which
            the kernel replaces by the values it chooses.
        grid: what they are rounded to, or None to round nothing.
        mask: bool [E, N, K], True = kept; read, or written where `size`; None keeps all.
        kept, size: keep the best `kept` of every `size` columns, or 0.
        loss: float32 [E, N], added to, or None.
        error: float32 [E, N, BLOCK_SIZE]; w minus the chosen values is written to its first columns.
    """

    w: Tensor
    U: Tensor
    d: Tensor
    work: Tensor
    work_first: int
    grid: BlockGrid | None
    mask: Tensor | None
    kept: int
    size: int
    loss: Tensor | None
    error: Tensor
    first: int
    last: int


LaunchBlock = Callable[[Block], None]
# Called with reached, d, removed, per_row, mask: writes mask [E, N, columns] (a view of columns), False
# for the `removed` lowest (reached * d)^2 of each expert, or of each row; ties by column, then by row.
# 0 < removed < the number there is.
Select = Callable[[Tensor, Tensor, int, bool, Tensor], None]


@dataclass(frozen=True)
class Pruning:
    """How a mask is chosen: `kept` of every `size` columns, or by `sparsity` if that is 0."""

    sparsity: float
    kept: int
    size: int
    per_row: bool


@dataclass(frozen=True)
class Fit:
    """How a dynamic group's grid is fitted; as `group_grid` takes it."""

    group_size: int
    symmetric: bool
    clip_search: bool
    scale_dtype: torch.dtype


def block_bounds(K: int, dynamic_group: int | None, size: int = 0) -> Iterator[tuple[int, int]]:
    """(first, last) column of each block: whole groups of `size`; a dynamic group starts a block."""
    step = BLOCK_SIZE // size * size if size else BLOCK_SIZE
    chunk = dynamic_group or K
    for start in range(0, K, chunk):
        end = min(start + chunk, K)
        for first in range(start, end, step):
            yield first, min(first + step, end)


@contextmanager
def full_float32() -> Iterator[None]:
    """Matrix products of float32 tensors in float32, whatever precision the process asks for."""
    modules = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [module.fp32_precision for module in modules]
    try:
        for module in modules:
            module.fp32_precision = "ieee"
        yield
    finally:
        for module, precision in zip(modules, before, strict=True):
            module.fp32_precision = precision


def run_blocks(
    launch_block: LaunchBlock,
    select: Select,
    w: Tensor,
    U: Tensor,
    d: Tensor,
    mask: Tensor | None,
    pruning: Pruning | None,
    grid: BlockGrid | None,
    fit: Fit | None,
    w_hat: Tensor,
    loss: Tensor,
) -> None:
    """Take w through the loop, block after block. Synchronizes nothing.

    Allocates the errors of one block, float32 [E, N, BLOCK_SIZE], and, if masks are chosen or groups
    fitted, as much again for the weights of a block or a group.

    Args:
        w, U, d: float32 [E, N, K], [E, K, K] and [E, K].
        mask: bool [E, N, K], True = kept; written if `pruning`, else read; None keeps all.
        pruning: choose the mask.
        grid: what the kept weights are rounded to, or None.
        fit: fit the grid's scales and zeros group by group; None reads them.
        w_hat: float32 [E, N, K], written.
        loss: float32 [E, N], written.
    """
    loop = _Loop(launch_block, select, w, U, d, mask, pruning, grid, fit, w_hat, loss)
    w_hat.copy_(w)
    loss.zero_()
    with full_float32():
        loop.run()


class _Loop:
    def __init__(
        self,
        launch_block: LaunchBlock,
        select: Select,
        w: Tensor,
        U: Tensor,
        d: Tensor,
        mask: Tensor | None,
        pruning: Pruning | None,
        grid: BlockGrid | None,
        fit: Fit | None,
        w_hat: Tensor,
        loss: Tensor,
    ) -> None:
        self.launch_block, self.select = launch_block, select
        self.w, self.U, self.d, self.mask = w, U, d, mask
        self.grid, self.fit, self.w_hat = grid, fit, w_hat
        self.K = w.shape[2]
        self.kept, self.size = (pruning.kept, pruning.size) if pruning else (0, 0)
        self.unstructured = pruning if pruning and not pruning.size else None
        error = w.new_empty(*w.shape[:2], BLOCK_SIZE)
        selection = (mask, self.kept, self.size)
        self.block = Block(w, U, d, w_hat, 0, grid, *selection, loss, error, 0, 0)

    def run(self) -> None:
        group = None if self.fit is None else self.fit.group_size
        chosen = dict(selection_blocks(self.K, group)) if self.unstructured else {}
        for first, last in block_bounds(self.K, group, self.size):
            end = chosen.get(first)
            due = self.fit if self.fit is not None and first % self.fit.group_size == 0 else None
            # A group of several blocks is fitted before they are chosen.
            wide = due is not None and end is not None and end < first + due.group_size
            if due is not None and wide:
                self._fit(due, first, self._reached(first, first + due.group_size))
            if self.unstructured is not None and end is not None:
                self._choose(self.unstructured, first, end)
            if due is not None and not wide:
                self._fit(due, first, self._tried(first, first + due.group_size))
            self._walk(replace(self.block, work_first=first, first=first, last=last), self.K)

    def _walk(self, block: Block, end: int) -> None:
        """One block, and its errors pushed onto the columns of `work` from there to `end`."""
        self.launch_block(block)
        if block.last < end:
            width = block.last - block.first
            later = block.work[..., block.work_first + width :]
            U = self.U[:, block.first : block.last, block.last : end]
            errors = block.error[..., :width]
            if len(later) == 1:
                later[0].addmm_(errors[0], U[0])
            else:
                later.baddbmm_(errors, U)

    def _reached(self, first: int, last: int) -> Tensor:
        """The weights that the loop reaches in these columns if it changes none of them."""
        span = slice(first, last)
        return unrounded(self.w_hat[..., span], self.w[..., span], self.U[:, span, span])

    def _tried(self, first: int, last: int) -> Tensor:
        """The weights of a group that a loop without rounding leaves, pruned ones zero."""
        if self.mask is None:
            return self._reached(first, last)
        work = self.w_hat[..., first:last].clone(memory_format=torch.contiguous_format)
        for start, stop in block_bounds(last - first, None, self.size):
            block = replace(self.block, work=work, work_first=start, grid=None, loss=None)
            self._walk(replace(block, first=first + start, last=first + stop), last)
        return work

    def _choose(self, pruning: Pruning, first: int, last: int) -> None:
        assert self.mask is not None
        rows, columns = 1 if pruning.per_row else self.w.shape[1], last - first
        removed = removed_until(last, rows, pruning.sparsity)
        removed -= removed_until(first, rows, pruning.sparsity)
        mask = self.mask[..., first:last]
        if 0 < removed < rows * columns:
            d = self.d[:, first:last]
            self.select(self._reached(first, last), d, removed, pruning.per_row, mask)
        else:
            mask.fill_(removed == 0)

    def _fit(self, fit: Fit, first: int, w: Tensor) -> None:
        assert self.grid is not None
        E, N, size = w.shape
        g = first // size
        book = self.grid.codebook
        if book is not None:
            book = book[:, :, g if book.shape[2] > 1 else 0]
            book = book.expand(E, N, 16).reshape(E * N, 16)
        options = (self.grid.bits, fit.symmetric, fit.clip_search, fit.scale_dtype, book)
        scales, zeros = group_grid(w.reshape(E * N, size), *options)
        self.grid.scales[..., g] = scales.view(E, N)
        self.grid.zeros[..., g] = zeros.view(E, N)
