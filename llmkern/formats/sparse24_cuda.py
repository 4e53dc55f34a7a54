"""Kernel layout of a 2:4 sparse weight on CUDA devices, and its exact inverse to the canonical one.

The weight is cut into chunks of 64 rows (N) by 128 columns (K) of the dense weight, both padded. A
chunk holds the kept values in the order of tensor core fragments with their metadata, and behind them
scales and zero points where values are 4-bit codes, so that one contiguous copy brings all that a CTA
multiplies with:

    values   [ceil(N / 64), ceil(K / 128), chunk bytes / 2], in the values' own dtype of 16 bits
    qvalues  uint8 [ceil(N / 64), ceil(K / 128), chunk bytes]

    one chunk:   half 0 | half 1 | 64 G scales | 64 G zero points   (these as in int4_cuda.py)
    one half:    values or codes of 64 columns (4096 or 1024 bytes) | metadata (512 bytes)

Values. Stored operand A of mma.sp m16n8k32 is 16 rows by 8 groups of 4 columns, a group being the pair
of its kept values. Lane l = 4 g + t of a warp holds the pairs p0 .. p3 of groups t and t + 4:

                     group t       group t + 4
    row g            p0            p2
    row g + 8        p1            p3

A half has 2 steps of 32 columns and 4 strips of 16 rows. 16-bit values: [step, strip, lane, p0 .. p3],
4 bytes each. Codes: [strip, lane, step], a word of 8 codes v0 .. v7 (p0 = v0 v1, ..) in the order of
int4_cuda.py, so that (word >> 4 i) & 0x000f000f is p_i in the halves of a register.

Metadata: [strip, lane], one word per lane: the 4 nibbles (as in sparse24.py) of the 16 columns from
16 (l % 4) on, of row g in the low half and of row g + 8 in the high half. mma.sp reads step 0 from lanes
l % 4 = 0, 1 (selector 0) and step 1 from lanes 2, 3 (selector 1).

Padding keeps columns 0 and 1 of a group, with value or code 0 and scale 0.

N, K and the size of a group travel in `meta` and `scales`, one element each, expanded to [K / 8, N] and
[K / group_size, N]; there are no separate zero points: the size of a chunk says whether it has them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmkern.formats.int4 import pack_zeros, unpack_zeros
from llmkern.formats.int4_cuda import (
    COLUMNS,
    ROWS,
    fragment_pairs,
    fragment_words,
    grid_from_chunks,
    grid_to_chunks,
    inline_group_size,
)
from llmkern.formats.sparse24 import check_codes

META_BYTES = ROWS * COLUMNS // 16  # of one half
VALUE_BYTES, CODE_BYTES = ROWS * COLUMNS // 2, ROWS * COLUMNS // 8  # likewise
_KEEPS_FIRST_TWO = 0x44  # metadata of two groups


def chunk_bytes(group_size: int, scale_bytes: int, symmetric: bool) -> int:
    """Bytes of one chunk of codes."""
    grids = ROWS * (COLUMNS // inline_group_size(group_size))
    return 2 * (CODE_BYTES + META_BYTES) + grids * (scale_bytes + (0 if symmetric else 1))


def cuda_shape(N: int, K: int) -> tuple[int, int, int]:
    """Shape of `values`."""
    return -(-N // ROWS), -(-K // COLUMNS), VALUE_BYTES + META_BYTES


def int4_cuda_shape(
    N: int, K: int, group_size: int, scale_bytes: int, symmetric: bool
) -> tuple[int, int, int]:
    """Shape of `qvalues`."""
    size = chunk_bytes(group_size, scale_bytes, symmetric)
    return -(-N // ROWS), -(-K // COLUMNS), size


def is_symmetric(qvalues: Tensor, scales: Tensor, group_size: int) -> bool:
    """Whether a weight of codes in this layout has no zero points."""
    return qvalues.shape[-1] == chunk_bytes(group_size, scales.element_size(), True)


def _pairs_to_lanes(pairs: Tensor, step_inside: bool) -> Tensor:
    """Pairs [64 tiles, 32 chunks] to [tiles, chunks, half, lanes of each step, p0 .. p3].

    With `step_inside`, to the steps of each lane.
    """
    tiles, chunks = pairs.shape[0] // ROWS, pairs.shape[1] // 32
    # [tile, strip, row / 8, g, chunk, half, step, group / 4, t]
    split = pairs.view(tiles, 4, 2, 8, chunks, 2, 2, 2, 4)
    order = (1, 3, 8, 6) if step_inside else (6, 1, 3, 8)
    return split.permute(0, 4, 5, *order, 7, 2).reshape(tiles, chunks, 2, -1, 4)


def _lanes_to_pairs(lanes: Tensor, step_inside: bool) -> Tensor:
    """Inverse of `_pairs_to_lanes`."""
    tiles, chunks = lanes.shape[:2]
    inner = (4, 8, 4, 2) if step_inside else (2, 4, 8, 4)
    split = lanes.reshape(tiles, chunks, 2, *inner, 2, 2)
    strip, g, t, step = (3, 4, 5, 6) if step_inside else (4, 5, 6, 3)
    split = split.permute(0, strip, 8, g, 1, 2, step, 7, t)
    return split.reshape(tiles * ROWS, chunks * 32)


def _meta_to_lanes(meta: Tensor) -> Tensor:
    """Metadata uint8 [N, K/8] to bytes [tiles, chunks, half, 512]."""
    N, octets = meta.shape
    meta = pad(meta, (0, -octets % 16, 0, -N % ROWS), value=_KEEPS_FIRST_TWO)
    tiles, chunks = meta.shape[0] // ROWS, meta.shape[1] // 16
    # [tile, strip, row / 8, g, chunk, half, lane % 4, byte]
    split = meta.view(tiles, 4, 2, 8, chunks, 2, 4, 2).permute(0, 4, 5, 1, 3, 6, 2, 7)
    return split.reshape(tiles, chunks, 2, META_BYTES)


def _lanes_to_meta(lanes: Tensor, N: int, K: int) -> Tensor:
    """Inverse of `_meta_to_lanes`."""
    tiles, chunks = lanes.shape[:2]
    split = lanes.reshape(tiles, chunks, 2, 4, 8, 4, 2, 2).permute(0, 3, 6, 4, 1, 2, 5, 7)
    return split.reshape(tiles * ROWS, chunks * 16)[:N, : K // 8].contiguous()


def _expect(fits: bool, names: str, got: object, wanted: str) -> None:
    if not fits:
        raise ValueError(f"{names}: got {got}, expected {wanted}")


def to_cuda_layout(values: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
    """Canonical layout (`llmkern.formats.sparse24`) to the CUDA kernel layout, on any device.

    Args:
        values: bfloat16 or float16 [N, K/2], the kept values.
        meta: uint8 [N, K/8].

    Returns:
        values [ceil(N/64), ceil(K/128), 4608] in the same dtype, meta uint8 [K/8, N] of one element in
        memory.

    Raises:
        ValueError: a dtype or shape is not as above.
    """
    dtypes = (torch.bfloat16, torch.float16)
    _expect(values.dtype in dtypes, "values", values.dtype, "bfloat16 or float16")
    N, octets = meta.shape
    fits = tuple(values.shape) == (N, 4 * octets)
    _expect(fits, "values, meta", [*values.shape, *meta.shape], "[N, K/2] and [N, K/8]")
    pairs = values.contiguous().view(torch.int32)
    pairs = pad(pairs, (0, -octets % 16 * 2, 0, -N % ROWS))
    lanes = _pairs_to_lanes(pairs, False)
    tiles, chunks = lanes.shape[:2]
    halves = lanes.view(torch.uint8).reshape(tiles, chunks, 2, VALUE_BYTES)
    data = torch.cat((halves, _meta_to_lanes(meta)), -1).flatten(2)
    # Zeros after `data`: the kernels read a weight before the stream's last grid has ended.
    return data.view(values.dtype), meta.new_zeros(()).expand(octets, N)


def from_cuda_layout(values: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
    """Exact inverse of `to_cuda_layout`.

    Args:
        values: bfloat16 or float16 [ceil(N/64), ceil(K/128), 4608].
        meta: uint8 [K/8, N], for its shape.

    Returns:
        values [N, K/2], meta uint8 [N, K/8].

    Raises:
        ValueError: the shapes do not fit together.
    """
    octets, N = meta.shape
    shape = cuda_shape(N, 8 * octets)
    _expect(tuple(values.shape) == shape, "values", list(values.shape), f"{list(shape)}")
    data = values.contiguous().view(torch.uint8).view(*shape[:2], 2, -1)
    pairs = _lanes_to_pairs(data[..., :VALUE_BYTES].contiguous().view(torch.int32), False)
    kept = pairs[:N, : 2 * octets].contiguous().view(values.dtype)
    return kept, _lanes_to_meta(data[..., VALUE_BYTES:], N, 8 * octets)


def int4_to_cuda_layout(
    qvalues: Tensor, meta: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor, Tensor, None]:
    """Canonical layout of 4-bit codes inside 2:4 to the CUDA kernel layout, on any device.

    Args:
        qvalues: int32 [N, K/16], 8 kept codes a word.
        meta: uint8 [N, K/8].
        scales: [N, K/group_size], any float dtype of 2 or 4 bytes, which is kept.
        zeros: int32 [ceil(N/8), K/group_size], or None.
        group_size: columns of the dense weight per scale, a multiple of 32.

    Returns:
        qvalues uint8 [ceil(N/64), ceil(K/128), chunk bytes], meta uint8 [K/8, N] and scales
        [K/group_size, N] of one element in memory each, None.

    Raises:
        ValueError: group_size and the shapes do not fit together.
    """
    check_codes(qvalues, meta, scales, group_size)
    N, groups = scales.shape
    K = groups * group_size
    words = pad(qvalues, (0, -K % COLUMNS // 16, 0, -N % ROWS)).contiguous()
    lanes = _pairs_to_lanes(words.view(torch.uint8), True)
    tiles, chunks = lanes.shape[:2]
    codes = fragment_words(lanes).reshape(tiles, chunks, 2, CODE_BYTES)
    parts = [torch.cat((codes, _meta_to_lanes(meta)), -1).flatten(2)]
    grid = grid_to_chunks(scales, K, group_size).contiguous()
    parts.append(grid.view(torch.uint8).reshape(tiles, chunks, -1))
    if zeros is not None:
        grid = grid_to_chunks(unpack_zeros(zeros, 4, N), K, group_size)
        parts.append(grid.reshape(tiles, chunks, -1))
    packed = torch.cat(parts, -1)
    # After `packed`: the kernels read a weight before the stream's last grid has ended.
    shape = meta.new_zeros(()).expand(K // 8, N), scales.new_zeros(()).expand(groups, N)
    return packed, *shape, None


def int4_from_cuda_layout(
    qvalues: Tensor, meta: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Exact inverse of `int4_to_cuda_layout`.

    Args:
        qvalues: uint8 [ceil(N/64), ceil(K/128), chunk bytes].
        meta: uint8 [K/8, N], for its shape.
        scales: [K/group_size, N], for its shape and dtype.
        zeros: None.
        group_size: columns of the dense weight per scale, a multiple of 32.

    Returns:
        qvalues int32 [N, K/16], meta uint8 [N, K/8], scales [N, K/group_size], zeros int32
        [ceil(N/8), K/group_size] or None.

    Raises:
        ValueError: group_size and the shapes do not fit together.
    """
    groups, N = scales.shape
    K, width = groups * group_size, scales.element_size()
    fits = group_size > 0 and group_size % 32 == 0
    shapes = [int4_cuda_shape(N, K, group_size, width, s) for s in (True, False)] if fits else []
    _expect(
        tuple(qvalues.shape) in shapes,
        "group_size, qvalues",
        f"{group_size} and {list(qvalues.shape)}",
        f"a multiple of 32 and {' or '.join(str(list(s)) for s in shapes) or 'chunks of it'}",
    )
    tiles, chunks = qvalues.shape[:2]
    half = CODE_BYTES + META_BYTES
    data = qvalues[..., : 2 * half].reshape(tiles, chunks, 2, half)
    codes = data[..., :CODE_BYTES].reshape(tiles, chunks, -1, 4)
    words = _lanes_to_pairs(fragment_pairs(codes), True)[:N, : K // 4]
    back_meta = _lanes_to_meta(data[..., CODE_BYTES:], N, K)
    shape = (tiles, chunks, COLUMNS // inline_group_size(group_size), 4, 8, 2)
    end = 2 * half + ROWS * shape[2] * width
    grid = qvalues[..., 2 * half : end].contiguous().view(scales.dtype).view(shape)
    back_zeros = None
    if end < qvalues.shape[-1]:
        inline = grid_from_chunks(qvalues[..., end:].reshape(shape), N, K, group_size)
        back_zeros = pack_zeros(inline, 4)
    back_scales = grid_from_chunks(grid, N, K, group_size)
    return words.contiguous().view(torch.int32), back_meta, back_scales, back_zeros
