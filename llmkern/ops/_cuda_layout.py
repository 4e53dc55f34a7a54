"""Repacking 4-bit weights for the CUDA kernels and back: by a kernel on a CUDA device, else in torch.

The layouts are `llmkern.formats.int4_cuda` and `lut4_cuda`; both ways give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern import _backends
from llmkern.formats import int4, int4_cuda, lut4_cuda
from llmkern.ops._library import kernels, pointer


def _served(qweight: Tensor) -> bool:
    return _backends.forced_backend() in (None, "cuda") and (
        _backends.refuse_cuda(qweight.device) is None
    )


def _run(
    direction: str,
    qweight: Tensor,
    grids: tuple[Tensor | None, Tensor | None, Tensor | None],
    chunks: Tensor,
    group_size: int,
    split_pairs: bool,
) -> None:
    """`grids`: scales, packed zero points and books of groups, in the canonical layout."""
    scales, zeros, books = grids
    device, stream = _backends.cuda_queue(qweight.device)
    getattr(kernels("_cuda"), f"{direction}_chunks")(
        qweight=pointer(qweight),
        scales=pointer(scales),
        zeros=pointer(zeros),
        books=pointer(books),
        chunks=pointer(chunks),
        N=qweight.shape[0],
        K=qweight.shape[1] * 8,
        group_size=group_size,
        scale_bytes=0 if scales is None else scales.element_size(),
        split_pairs=split_pairs,
        device=device,
        stream=stream,
    )


def pack_int4(
    qweight: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor, None]:
    """`int4_cuda.to_cuda_layout`."""
    if not _served(qweight):
        return int4_cuda.to_cuda_layout(qweight, scales, zeros, group_size)
    int4.check_canonical(qweight, scales, group_size)
    N, groups = scales.shape
    shape = int4_cuda.cuda_shape(
        N, groups * group_size, group_size, scales.element_size(), zeros is None
    )
    chunks = torch.empty(shape, dtype=torch.uint8, device=qweight.device)
    grids = (scales.contiguous(), None if zeros is None else zeros.contiguous(), None)
    _run("pack", qweight.contiguous(), grids, chunks, group_size, True)
    # This comes last: the matmul kernels may read chunks before the stream's previous grid has ended.
    return chunks, scales.new_zeros(()).expand(groups, N), None


def unpack_int4(
    qweight: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`int4_cuda.from_cuda_layout`."""
    if not _served(qweight):
        return int4_cuda.from_cuda_layout(qweight, scales, zeros, group_size)
    int4_cuda.check_chunks(qweight, scales, group_size)
    groups, N = scales.shape
    codes = torch.empty(N, groups * group_size // 8, dtype=torch.int32, device=qweight.device)
    grid = torch.empty(N, groups, dtype=scales.dtype, device=qweight.device)
    points = None
    if not int4_cuda.is_symmetric(qweight, scales, group_size):
        points = torch.empty(-(-N // 8), groups, dtype=torch.int32, device=qweight.device)
    _run("unpack", codes, (grid, points, None), qweight.contiguous(), group_size, True)
    return codes, grid, points


def pack_lut4(
    qweight: Tensor, codebook: Tensor, scales: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`lut4_cuda.to_cuda_layout`."""
    if not _served(qweight):
        return lut4_cuda.to_cuda_layout(qweight, codebook, scales, group_size)
    lut4_cuda.check_canonical(qweight, codebook, scales, group_size)
    N, K = qweight.shape[0], qweight.shape[1] * 8
    width, books = 0 if scales is None else scales.element_size(), codebook.dim() == 3
    shape = lut4_cuda.cuda_shape(N, K, group_size, width, books)
    chunks = torch.empty(shape, dtype=torch.uint8, device=qweight.device)
    grids = (
        None if scales is None else scales.contiguous(),
        None,
        codebook.contiguous() if books else None,
    )
    _run("pack", qweight.contiguous(), grids, chunks, group_size, False)
    # These come last, as above.
    return chunks, *lut4_cuda.placeholders(qweight, codebook, scales, group_size)


def unpack_lut4(
    qweight: Tensor, codebook: Tensor, scales: Tensor, group_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`lut4_cuda.from_cuda_layout`."""
    if not _served(qweight):
        return lut4_cuda.from_cuda_layout(qweight, codebook, scales, group_size)
    lut4_cuda.check_chunks(qweight, codebook, scales, group_size)
    groups, N = scales.shape
    codes = torch.empty(N, groups * group_size // 8, dtype=torch.int32, device=qweight.device)
    grid, books = None, None
    if lut4_cuda.has_scales(qweight, codebook, group_size):
        grid = torch.empty(N, groups, dtype=scales.dtype, device=qweight.device)
    if codebook.dim() == 3:
        books = torch.empty(N, groups, 16, device=qweight.device)
    _run("unpack", codes, (grid, None, books), qweight.contiguous(), group_size, False)
    return codes, codebook if books is None else books, grid
