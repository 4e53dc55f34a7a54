"""Kernel layout of a look-up-table weight on CUDA devices, and its exact inverse to the canonical one.

The chunks of `int4_cuda.py`, 64 rows (N) by 128 columns (K), with scales and the books of groups inside:

    qweight   uint8 [ceil(N / 64), ceil(K / 128), chunk bytes]

    one chunk:   4096 bytes of codes | 64 G scales (2 or 4 bytes each, absent when all are 1) | 64 G
                 books of 16 float32 [G, row, 16] (absent unless groups have books)

A lane's word holds the values v0 .. v7 of `int4_cuda.py` in order, v0 in bits 0..3: a byte is the pair
of one register of operand A, and looks both up at once.

Scales as there. Padding has code 0 and scale 0, and books of zeros.

Shape, dtype and group count travel in `scales`, one element expanded to [K / group_size, N]; the size
of a chunk says whether it has scales. One book for all stays as it is, and so do books of rows; of
books of groups one element expanded to [N, K / group_size, 16] is left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.formats.int4_cuda import (
    CODE_BYTES,
    COLUMNS,
    ROWS,
    grid_from_chunks,
    grid_to_chunks,
    inline_group_size,
    pairs_from_chunks,
    pairs_to_chunks,
)

BOOK_BYTES = 64


def chunk_bytes(group_size: int, scale_bytes: int, books: bool) -> int:
    """Bytes of one chunk; scale_bytes is 0 where there are no scales."""
    grids = ROWS * (COLUMNS // inline_group_size(group_size))
    return CODE_BYTES + grids * (scale_bytes + (BOOK_BYTES if books else 0))


def cuda_shape(
    N: int, K: int, group_size: int, scale_bytes: int, books: bool
) -> tuple[int, int, int]:
    """Shape of qweight."""
    size = chunk_bytes(group_size, scale_bytes, books)
    return -(-N // ROWS), -(-K // COLUMNS), size


def has_scales(qweight: Tensor, codebook: Tensor, group_size: int) -> bool:
    """Whether a weight in this layout has scales."""
    return qweight.shape[-1] != chunk_bytes(group_size, 0, codebook.dim() == 3)


def placeholders(
    qweight: Tensor, codebook: Tensor, scales: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor]:
    """What a canonical weight's codebook and scales are in this layout."""
    N, groups = len(qweight), qweight.shape[1] * 8 // group_size
    dtype = torch.float32 if scales is None else scales.dtype
    shape = torch.zeros((), dtype=dtype, device=qweight.device).expand(groups, N)
    return codebook.new_zeros(()).expand(N, groups, 16) if codebook.dim() == 3 else codebook, shape


def to_cuda_layout(
    qweight: Tensor, codebook: Tensor, scales: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Canonical layout (`llmkern.formats.lut4`) to the CUDA kernel layout, on any device.

    Args:
        qweight: int32 [N, K/8].
        codebook: float32 [16], [N, 16] or [N, K/group_size, 16].
        scales: float [N, K/group_size], any float dtype of 2 or 4 bytes, which is kept; or None.
        group_size: K-elements per scale, a multiple of 32 that divides K.

    Returns:
        qweight uint8 [ceil(N/64), ceil(K/128), chunk bytes], codebook, and scales [K/group_size, N] of
        one element in memory.

    Raises:
        ValueError: group_size and the shapes do not fit together.
    """
    N, K = qweight.shape[0], qweight.shape[1] * 8
    check_canonical(qweight, codebook, scales, group_size)
    pairs = pairs_to_chunks(qweight)
    tiles, chunks = pairs.shape[:2]
    parts = [pairs.reshape(tiles, chunks, CODE_BYTES)]
    if scales is not None:
        grid = grid_to_chunks(scales, K, group_size).contiguous()
        parts.append(grid.view(torch.uint8).reshape(tiles, chunks, -1))
    if codebook.dim() == 3:
        inline = inline_group_size(group_size)
        books = codebook.repeat_interleave(group_size // inline, 1)
        books = torch.nn.functional.pad(books, (0, 0, 0, -K % COLUMNS // inline, 0, -N % ROWS))
        books = books.view(tiles, ROWS, chunks, COLUMNS // inline, 16).permute(0, 2, 3, 1, 4)
        parts.append(books.contiguous().view(torch.uint8).reshape(tiles, chunks, -1))
    return torch.cat(parts, -1), *placeholders(qweight, codebook, scales, group_size)


def from_cuda_layout(
    qweight: Tensor, codebook: Tensor, scales: Tensor, group_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Exact inverse of `to_cuda_layout`.

    Args:
        qweight: uint8 [ceil(N/64), ceil(K/128), chunk bytes].
        codebook: float32 [16], [N, 16], or [N, K/group_size, 16] for its shape.
        scales: [K/group_size, N], for its shape and dtype.
        group_size: K-elements per scale, a multiple of 32.

    Returns:
        qweight int32 [N, K/8], codebook as in the canonical layout, scales [N, K/group_size] or None.

    Raises:
        ValueError: group_size and the shapes do not fit together.
    """
    groups, N = scales.shape
    K = groups * group_size
    check_chunks(qweight, codebook, scales, group_size)
    tiles, chunks = qweight.shape[:2]
    count = COLUMNS // inline_group_size(group_size)
    pairs = qweight[..., :CODE_BYTES].reshape(tiles, chunks, -1, 4)
    end, grid = CODE_BYTES, None
    if has_scales(qweight, codebook, group_size):
        end += ROWS * count * scales.element_size()
        inline = qweight[..., CODE_BYTES:end].contiguous().view(scales.dtype)
        grid = grid_from_chunks(inline.view(tiles, chunks, count, 4, 8, 2), N, K, group_size)
    if codebook.dim() == 3:
        books = qweight[..., end:].contiguous().view(torch.float32)
        books = books.view(tiles, chunks, count, ROWS, 16).permute(0, 3, 1, 2, 4)
        step = group_size // inline_group_size(group_size)
        books = books.reshape(tiles * ROWS, -1, 16)[:N, : groups * step : step]
        codebook = books.contiguous()
    return pairs_from_chunks(pairs, N, K), codebook, grid


def check_canonical(
    qweight: Tensor, codebook: Tensor, scales: Tensor | None, group_size: int
) -> None:
    """Refuse a canonical weight whose parts do not fit together.

    Raises:
        ValueError: says what was given.
    """
    N, K = qweight.shape[0], qweight.shape[1] * 8
    fits = group_size > 0 and group_size % 32 == 0 and K % group_size == 0
    groups = K // group_size if fits else 0
    if (
        not fits
        or tuple(codebook.shape) not in ((16,), (N, 16), (N, groups, 16))
        or (scales is not None and tuple(scales.shape) != (N, groups))
    ):
        raise ValueError(
            f"group_size, codebook, scales: got {group_size}, {list(codebook.shape)} and "
            f"{None if scales is None else list(scales.shape)}, expected a multiple of 32 that divides "
            f"K = {K}, [16], [{N}, 16] or [{N}, groups, 16], and [{N}, groups] or None"
        )


def check_chunks(qweight: Tensor, codebook: Tensor, scales: Tensor, group_size: int) -> None:
    """Refuse chunks that are not of the shape that the rest of the weight asks for.

    Raises:
        ValueError: says what was given.
    """
    groups, N = scales.shape
    K, books = groups * group_size, codebook.dim() == 3
    fits = group_size > 0 and group_size % 32 == 0
    widths = (scales.element_size(), 0) if fits else ()
    shapes = [cuda_shape(N, K, group_size, width, books) for width in widths]
    if tuple(qweight.shape) not in shapes:
        raise ValueError(
            f"group_size, qweight: got {group_size} and {list(qweight.shape)}, expected a multiple of "
            f"32 and {' or '.join(str(list(shape)) for shape in shapes) or 'chunks of it'}"
        )
