"""The CUDA and Triton backends of obs_quantize and obs_prune: the loop over blocks with their kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern import _backends
from llmkern.ops._library import pointer
from llmkern.ops._obs_blocks import (
    Block,
    BlockGrid,
    Fit,
    LaunchBlock,
    Pruning,
    Select,
    run_blocks,
)


def cuda_block(block: Block) -> None:
    """A `LaunchBlock` of `_obs_blocks`."""
    module, _ = _backends.compiled_module("_cuda")
    assert module is not None
    grid, (E, N, K) = block.grid, block.w.shape
    tensors = (
        *(block.w, block.U, block.d),
        *((grid.g_idx, grid.codebook, grid.scales, grid.zeros) if grid else (None,) * 4),
        *(block.mask, grid.codes if grid else None, block.work, block.loss, block.error),
    )
    sizes = (
        *(E, N, K, grid.scales.shape[2] if grid else 0),
        *(grid.book_strides() if grid else (0, 0, 0)),
        *(block.first, block.last, block.work_first),
        *(block.work.shape[2], block.error.shape[2]),
    )
    module.obs_block(
        [pointer(t) for t in tensors],
        sizes,
        grid.bits if grid else 0,
        block.kept,
        block.size,
        *_backends.cuda_queue(block.w.device),
    )


def cuda_select(reached: Tensor, d: Tensor, removed: int, per_row: bool, mask: Tensor) -> None:
    """A `Select` of `_obs_blocks`; allocates keys, int32 [E, columns, N], and their counts."""
    module, _ = _backends.compiled_module("_cuda")
    assert module is not None
    E, N, columns = reached.shape
    reached = reached.contiguous()
    keys = counts = None
    if not per_row:
        keys = torch.empty(E, columns, N, dtype=torch.int32, device=d.device)
        size = module.obs_select_counts(N, columns)
        counts = torch.zeros(E, size, dtype=torch.int32, device=d.device)
    module.obs_select(
        *(pointer(t) for t in (reached, d, mask, keys, counts)),
        *(E, N, columns, d.stride(0), mask.stride(1)),
        *(0 if counts is None else counts.shape[1], removed, per_row),
        *_backends.cuda_queue(d.device),
    )


def triton_block(block: Block) -> None:
    """A `LaunchBlock` of `_obs_blocks`."""
    from llmkern.triton_kernels.obs_quantize import launch_block

    grid = block.grid
    launch_block(
        *(block.w, block.U, block.d),
        (grid.g_idx, grid.codebook, grid.scales, grid.zeros) if grid else None,
        grid.book_strides() if grid else (0, 0, 0),
        grid.bits if grid else 0,
        *(block.mask, block.kept, block.size),
        grid.codes if grid else None,
        *(block.work, block.loss, block.error),
        *(block.first, block.last, block.work_first),
    )


def _kernels(backend: str) -> tuple[LaunchBlock, Select]:
    if backend == "cuda":
        return cuda_block, cuda_select
    from llmkern.triton_kernels.obs_prune import select

    return triton_block, select


def quantize(
    backend: str,
    w: Tensor,
    U: Tensor,
    d: Tensor,
    mask: Tensor | None,
    g_idx: Tensor,
    codebook: Tensor | None,
    dynamic: bool,
    bits: int,
    group_size: int,
    symmetric: bool,
    clip_search: bool,
    scale_dtype: torch.dtype,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    w_hat: Tensor,
    loss: Tensor,
) -> None:
    """obs_quantize on "cuda" or "triton"; arguments and outputs as its backends get them."""
    grid = BlockGrid(g_idx, codebook, scales, zeros, bits, codes)
    fit = Fit(group_size, symmetric, clip_search, scale_dtype) if dynamic else None
    run_blocks(*_kernels(backend), w, U, d, mask, None, grid, fit, w_hat, loss)


def prune(
    backend: str,
    w: Tensor,
    U: Tensor,
    d: Tensor,
    mask: Tensor | None,
    sparsity: float,
    kept: int,
    size: int,
    per_row: bool,
    g_idx: Tensor | None,
    codebook: Tensor | None,
    dynamic: bool,
    bits: int,
    group_size: int,
    symmetric: bool,
    clip_search: bool,
    scale_dtype: torch.dtype,
    out_mask: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    w_hat: Tensor,
    loss: Tensor,
) -> None:
    """obs_prune on "cuda" or "triton"; arguments and outputs as its backends get them."""
    pruning = Pruning(sparsity, kept, size, per_row) if mask is None else None
    # A group is fitted before its unstructured mask is chosen where it is the wider of the two.
    out_mask.fill_(True) if mask is None else out_mask.copy_(mask)
    grid = fit = None
    if g_idx is not None:
        grid = BlockGrid(g_idx, codebook, scales, zeros, bits, codes)
        fit = Fit(group_size, symmetric, clip_search, scale_dtype) if dynamic else None
    run_blocks(*_kernels(backend), w, U, d, out_mask, pruning, grid, fit, w_hat, loss)
