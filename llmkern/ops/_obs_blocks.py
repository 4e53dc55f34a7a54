"""The column loop of obs_quantize by blocks of columns, for the backends whose kernel does one block.

The kernel quantizes the columns of a block and returns their errors E = w - w_hat; one matrix product
then pushes them onto all later columns: work[:, last:] += E @ U[first:last, last:]. The working matrix
lies in w_hat: columns before the block hold results, the others hold w' of
`llmkern.reference.obs_quantize`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from llmkern.reference.obs_quantize import group_grid, unrounded

BLOCK_SIZE = 128  # columns per launch; the errors' buffer has this many

# Called with w, U, d, g_idx, bits, codes, scales, zeros, w_hat, loss, first, last, error: quantize
# columns first..last-1 of w_hat, which hold the updated weights, in place. Reads w, U, d and g_idx there,
# and scales and zeros of the groups that it meets; writes codes and w_hat there,
# error[:, :last - first] (= w - w_hat), and adds to loss.
LaunchBlock = Callable[..., None]


def block_bounds(K: int, group_size: int, dynamic: bool) -> Iterator[tuple[int, int]]:
    """(first, last) column of each block; a dynamic group starts a block."""
    chunk = group_size if dynamic else K
    for start in range(0, K, chunk):
        end = min(start + chunk, K)
        for first in range(start, end, BLOCK_SIZE):
            yield first, min(first + BLOCK_SIZE, end)


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
    w: Tensor,
    U: Tensor,
    d: Tensor,
    g_idx: Tensor,
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
    """Quantize w, block after block; arguments and outputs as a backend of obs_quantize gets them.

    Allocates the errors of one block, float32 [N, BLOCK_SIZE]. Synchronizes nothing.
    """
    K = w.shape[1]
    args = (w, U, d, g_idx, bits, codes, scales, zeros, w_hat, loss)
    error = w.new_empty(w.shape[0], BLOCK_SIZE)
    w_hat.copy_(w)
    loss.zero_()
    with full_float32():
        for first, last in block_bounds(K, group_size, dynamic):
            if dynamic and first % group_size == 0:
                g, span = first // group_size, slice(first, first + group_size)
                group = unrounded(w_hat[:, span], w[:, span], U[span, span])
                scales[:, g], zeros[:, g] = group_grid(
                    group, bits, symmetric, clip_search, scale_dtype
                )
            launch_block(*args, first, last, error)
            if last < K:
                w_hat[:, last:].addmm_(error[:, : last - first], U[first:last, last:])
