"""The CUDA and Triton backends of obs_quantize and obs_prune: the loop over blocks with their kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern import _backends
from llmkern.ops._library import kernels, pointer
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
    grid, (E, N, K) = block.grid, block.w.shape
    tensors = {
        "w": block.w,
        "U": block.U,
        "d": block.d,
        "g_idx": grid.g_idx if grid else None,
        "codebook": grid.codebook if grid else None,
        "scales": grid.scales if grid else None,
        "zeros": grid.zeros if grid else None,
        "mask": block.mask,
        "codes": grid.codes if grid else None,
        "work": block.work,
        "loss": block.loss,
        "error": block.error,
    }
    book_expert, book_row, book_group = grid.book_strides() if grid else (0, 0, 0)
    device, stream = _backends.cuda_queue(block.w.device)
    kernels("_cuda").obs_block(
        **{name: pointer(tensor) for name, tensor in tensors.items()},
        E=E,
        N=N,
        K=K,
        groups=grid.scales.shape[2] if grid else 0,
        book_expert=book_expert,
        book_row=book_row,
        book_group=book_group,
        first=block.first,
        last=block.last,
        work_first=block.work_first,
        work_stride=block.work.shape[2],
        error_stride=block.error.shape[2],
        bits=grid.bits if grid else 0,
        kept=block.kept,
        size=block.size,
        device=device,
        stream=stream,
    )


def cuda_select(reached: Tensor, d: Tensor, removed: int, per_row: bool, mask: Tensor) -> None:
    """A `Select` of `_obs_blocks`; allocates keys, int32 [E, columns, N], and their counts."""
    E, N, columns = reached.shape
    reached = reached.contiguous()
    keys = counts = None
    if not per_row:
        keys = torch.empty(E, columns, N, dtype=torch.int32, device=d.device)
        size = kernels("_cuda").obs_select_counts(N, columns)
        counts = torch.zeros(E, size, dtype=torch.int32, device=d.device)
    device, stream = _backends.cuda_queue(d.device)
    kernels("_cuda").obs_select(
        reached=pointer(reached),
        d=pointer(d),
        mask=pointer(mask),
        keys=pointer(keys),
        counts=pointer(counts),
        E=E,
        N=N,
        columns=columns,
        d_stride=d.stride(0),
        mask_stride=mask.stride(1),
        counts_stride=0 if counts is None else counts.shape[1],
        removed=removed,
        per_row=per_row,
        device=device,
        stream=stream,
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
