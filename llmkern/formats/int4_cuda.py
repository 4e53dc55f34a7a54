"""Kernel layout of a 4-bit weight on CUDA devices, and its exact inverse to the canonical one.

The weight is cut into chunks of 64 rows (N) by 128 columns (K), both padded. A chunk holds its codes in
the order of tensor core fragments and its scales and zero points behind them, so that one contiguous
copy brings all that a CTA multiplies with:

    qweight  uint8 [ceil(N / 64), ceil(K / 128), chunk bytes]

    one chunk:   4096 bytes of codes | 64 G scales (2 or 4 bytes each) | 64 G zero points (1 byte each,
                                                                         absent when symmetric)

Codes. Operand A of mma m16n8k16 is 16 rows by 16 columns; lane l = 4 g + t of a warp holds the columns
c = 2t, 2t + 1 of four places, eight values v0 .. v7:

                     columns c       columns c + 8
    row g           v0 v1           v4 v5
    row g + 8       v2 v3           v6 v7

    a lane's word:   | v7 | v5 | v3 | v1 | v6 | v4 | v2 | v0 |    (v0 in bits 0..3)

so (word >> 4 i) & 0x000f000f is the pair (v[2i], v[2i + 1]) in the halves of a register. A chunk has 4
strips of 16 rows and 8 steps of 16 columns; word [half, strip, lane, j] is lane's word of step
4 * half + j, which makes one 16-byte read of each lane four steps.

Scales and zero points: [G, strip, g, 2], the two of rows 16 strip + g and 16 strip + g + 8 adjacent. G
is 128 over the largest of 32, 64 and 128 that divides group_size: groups that are longer are repeated.
Padding has code 0 and scale 0.

Shape, dtype and group count travel in `scales`, one element expanded to [K / group_size, N]; there are
no separate zero points: the size of a chunk says whether it has them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.formats.int4 import check_canonical, pack_zeros, unpack_zeros

ROWS, COLUMNS = 64, 128
CODE_BYTES = ROWS * COLUMNS // 2


def inline_group_size(group_size: int) -> int:
    """Columns per scale inside a chunk."""
    return next(size for size in (128, 64, 32) if group_size % size == 0)


def chunk_bytes(group_size: int, scale_bytes: int, symmetric: bool) -> int:
    """Bytes of one chunk."""
    grids = ROWS * (COLUMNS // inline_group_size(group_size))
    return CODE_BYTES + grids * (scale_bytes + (0 if symmetric else 1))


def cuda_shape(
    N: int, K: int, group_size: int, scale_bytes: int, symmetric: bool
) -> tuple[int, int, int]:
    """Shape of qweight."""
    size = chunk_bytes(group_size, scale_bytes, symmetric)
    return -(-N // ROWS), -(-K // COLUMNS), size


def is_symmetric(qweight: Tensor, scales: Tensor, group_size: int) -> bool:
    """Whether a weight in this layout has no zero points."""
    return qweight.shape[-1] == chunk_bytes(group_size, scales.element_size(), True)


def grid_to_chunks(grid: Tensor, K: int, group_size: int) -> Tensor:
    """Scales or zero points [N, groups] as [tiles, chunks, G, strip, g, 2], padded with zeros."""
    inline = inline_group_size(group_size)
    N = grid.shape[0]
    grid = grid.repeat_interleave(group_size // inline, 1)
    grid = torch.nn.functional.pad(grid, (0, -K % COLUMNS // inline, 0, -N % ROWS))
    grid = grid.view(-1, 4, 2, 8, -(-K // COLUMNS), COLUMNS // inline)
    return grid.permute(0, 4, 5, 1, 3, 2)


def grid_from_chunks(grid: Tensor, N: int, K: int, group_size: int) -> Tensor:
    """Inverse of `grid_to_chunks`."""
    inline = inline_group_size(group_size)
    grid = grid.permute(0, 3, 5, 4, 1, 2).reshape(grid.shape[0] * ROWS, -1)
    return grid[:N, : K // inline : group_size // inline].contiguous()


def fragment_words(pairs: Tensor) -> Tensor:
    """A lane's codes (v0, v1), (v2, v3), .., a byte each, to its word: uint8 [.., 4] both."""
    low, high = pairs & 15, pairs >> 4
    nibbles = torch.cat((low, high), -1)  # v0 v2 v4 v6 v1 v3 v5 v7
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def fragment_pairs(words: Tensor) -> Tensor:
    """Inverse of `fragment_words`."""
    nibbles = torch.stack((words & 15, words >> 4), -1).flatten(-2)
    return nibbles[..., :4] | nibbles[..., 4:] << 4


def pairs_to_chunks(qweight: Tensor) -> Tensor:
    """Canonical int32 [N, K/8] to the pairs (v0, v1), (v2, v3), .. of each lane's word, a byte each.

    Returns:
        uint8 [ceil(N/64), ceil(K/128), 1024, 4], padded with zeros.
    """
    octets = torch.nn.functional.pad(
        qweight, (0, -qweight.shape[1] % (COLUMNS // 8), 0, -len(qweight) % ROWS)
    )
    tiles, chunks = octets.shape[0] // ROWS, octets.shape[1] * 8 // COLUMNS
    # A byte is a pair of columns of one row: [tile, strip, row / 8, g, chunk, half, j, column / 8, t].
    pairs = octets.contiguous().view(torch.uint8).view(tiles, 4, 2, 8, chunks, 2, 4, 2, 4)
    # [tile, chunk, half, strip, g, t, j, column / 8, row / 8]
    return pairs.permute(0, 4, 5, 1, 3, 8, 6, 7, 2).reshape(tiles, chunks, -1, 4)


def pairs_from_chunks(pairs: Tensor, N: int, K: int) -> Tensor:
    """Inverse of `pairs_to_chunks`."""
    tiles, chunks = pairs.shape[:2]
    rows = pairs.view(tiles, chunks, 2, 4, 8, 4, 4, 2, 2).permute(0, 3, 8, 4, 1, 2, 6, 7, 5)
    rows = rows.reshape(tiles * ROWS, chunks * COLUMNS // 2)[:N, : K // 2]
    return rows.contiguous().view(torch.int32)


def to_cuda_layout(
    qweight: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor, None]:
    """Canonical layout (`llmkern.formats.int4`) to the CUDA kernel layout, on any device.

    Args:
        qweight: int32 [N, K/8].
        scales: float [N, K/group_size], any float dtype of 2 or 4 bytes, which is kept.
        zeros: int32 [ceil(N/8), K/group_size], or None.
        group_size: K-elements per scale, a multiple of 32.

    Returns:
        qweight uint8 [ceil(N/64), ceil(K/128), chunk bytes], scales [K/group_size, N] of one element in
        memory, None.

    Raises:
        ValueError: group_size and the shapes do not fit together.
    """
    check_canonical(qweight, scales, group_size)
    N, groups = scales.shape
    K = groups * group_size
    pairs = pairs_to_chunks(qweight)
    tiles, chunks = pairs.shape[:2]
    parts = [fragment_words(pairs).reshape(tiles, chunks, CODE_BYTES)]
    grid = grid_to_chunks(scales, K, group_size).contiguous()
    parts.append(grid.view(torch.uint8).reshape(tiles, chunks, -1))
    if zeros is not None:
        grid = grid_to_chunks(unpack_zeros(zeros, 4, N), K, group_size)
        parts.append(grid.reshape(tiles, chunks, -1))
    return torch.cat(parts, -1), scales.new_zeros(()).expand(groups, N), None


def from_cuda_layout(
    qweight: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Exact inverse of `to_cuda_layout`.

    Args:
        qweight: uint8 [ceil(N/64), ceil(K/128), chunk bytes].
        scales: [K/group_size, N], for its shape and dtype.
        zeros: None.
        group_size: K-elements per scale, a multiple of 32.

    Returns:
        qweight int32 [N, K/8], scales [N, K/group_size], zeros int32 [ceil(N/8), K/group_size] or None.

    Raises:
        ValueError: group_size and the shapes do not fit together.
    """
    check_chunks(qweight, scales, group_size)
    groups, N = scales.shape
    K, width = groups * group_size, scales.element_size()
    tiles, chunks = qweight.shape[:2]
    codes = qweight[..., :CODE_BYTES].reshape(tiles, chunks, -1, 4)
    count = COLUMNS // inline_group_size(group_size)
    shape = (tiles, chunks, count, 4, 8, 2)
    end = CODE_BYTES + ROWS * count * width
    grid = qweight[..., CODE_BYTES:end].contiguous().view(scales.dtype).view(shape)
    back = None
    if end < qweight.shape[-1]:
        inline_zeros = qweight[..., end:].reshape(shape)
        back = pack_zeros(grid_from_chunks(inline_zeros, N, K, group_size), 4)
    canonical = pairs_from_chunks(fragment_pairs(codes), N, K)
    return canonical, grid_from_chunks(grid, N, K, group_size), back


def check_chunks(qweight: Tensor, scales: Tensor, group_size: int) -> None:
    """Refuse chunks that are not of the shape that the rest of the weight asks for.

    Raises:
        ValueError: says what was given.
    """
    groups, N = scales.shape
    K, width = groups * group_size, scales.element_size()
    fits = group_size > 0 and group_size % 32 == 0
    shapes = [cuda_shape(N, K, group_size, width, s) for s in (True, False)] if fits else []
    if tuple(qweight.shape) not in shapes:
        raise ValueError(
            f"group_size, qweight: got {group_size} and {list(qweight.shape)}, expected a multiple of "
            f"32 and {' or '.join(str(list(shape)) for shape in shapes) or 'chunks of it'}"
        )
