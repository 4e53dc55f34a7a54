"""The CUDA and Triton backends of obs_quantize and obs_prune: the loop over blocks with their kernels."""

from __future__ import annotations

from typing import Any

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
from llmkern.ops._obs_grid import Outputs


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


def run(
    backend: str, call: Any, mask: Tensor | None, pruning: Pruning | None, out: Outputs
) -> None:
    """The loop of obs_quantize or obs_prune.

    Args:
        backend: "cuda" or "triton".
        call: the op's arguments.
        mask: bool [E, N, K]; with `pruning`, it is chosen as the loop goes.
        pruning: what is chosen.
        out: what is filled.
    """
    grid = fit = None
    if call.g_idx is not None:
        grid = BlockGrid(call.g_idx, call.codebook, out.scales, out.zeros, call.bits, out.codes)
        if call.scales is None:
            fit = Fit(call.group_size, call.symmetric, call.clip_search, call.scale_dtype)
    weight = (call.w, call.U, call.d)
    run_blocks(*_kernels(backend), *weight, mask, pruning, grid, fit, out.w_hat, out.loss)
