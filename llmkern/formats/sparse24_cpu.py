"""Kernel layout of a 2:4 weight on the CPU, and its exact inverse to the canonical one.

N is cut into blocks of 16 rows, the lanes of a vector, whose groups of 4 columns follow one another:

    values   float [N / 16, K / 4, 32]      block n // 16, group g: the kept values of 16 rows
    meta     int32 [N / 16, K / 32, 16]     8 nibbles of a row per word, the lowest group lowest

    one group, bfloat16:          | row 0: first, second | row 1: first, second | ... | row 15 |
    one group, other dtypes:      | firsts of rows 0 .. 15 | seconds of rows 0 .. 15 |

A dword of bfloat16 is the pair that a dot-product instruction (vdpbf16ps) consumes; the others are
widened or read as whole vectors. A lane takes its columns of x by a permutation whose index is its
nibble. 4-bit codes:

    qvalues  int32 [N / 16, K / 16, 16]     8 kept codes of a row per word
    scales   float [K / group_size, N]      transposed, as in int4_cpu.py
    zeros    uint8 [K / group_size, N]      one byte each; absent when symmetric (constant 8)

    a word:   | c7 | c5 | c3 | c1 | c6 | c4 | c2 | c0 |    (c0 in bits 0..3)

so that (word >> 4 i) holds group i's first code in its low half and the second in its high half. N is a
multiple of 16 and K of 32; other weights stay in the canonical layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern._memory import empty_huge
from llmkern.formats.int4 import pack_bits, unpack_zeros
from llmkern.formats.sparse24 import check_codes, check_parts

ROWS, COLUMNS = 16, 32
# Place in a word of each code, and its inverse: even codes in the low half, odd ones in the high half.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)


def fits(N: int, K: int) -> bool:
    """Whether a weight [N, K] can be brought into this layout."""
    return N % ROWS == 0 and K % COLUMNS == 0


def _expect_fit(N: int, K: int) -> None:
    if not fits(N, K):
        raise ValueError(
            f"values: got N = {N}, K = {K}, expected multiples of {ROWS} and {COLUMNS} (cpu layout)"
        )


def _words_to_blocks(words: Tensor) -> Tensor:
    """int32 [N, C] to [N / 16, C, 16], on huge pages where the system has them."""
    blocks = words.view(len(words) // ROWS, ROWS, -1).transpose(1, 2)
    return empty_huge(tuple(blocks.shape), words.dtype).copy_(blocks)


def _blocks_to_words(blocks: Tensor) -> Tensor:
    """Inverse of `_words_to_blocks`."""
    words = blocks.transpose(1, 2).reshape(len(blocks) * ROWS, -1)
    return words.clone(
        memory_format=torch.contiguous_format
    )  # with unit strides, whatever the sizes


def _reorder(words: Tensor, order: tuple[int, ...]) -> Tensor:
    """Words whose nibble i is nibble order[i] of the given ones."""
    out = torch.zeros_like(words)
    for i, source in enumerate(order):
        out |= (words >> (4 * source) & 15) << (4 * i)
    return out


def _pair_order(dtype: torch.dtype) -> tuple[int, ...]:
    """[block, row, group, pair] in the order in which a block holds values of `dtype`."""
    return (0, 2, 1, 3) if dtype == torch.bfloat16 else (0, 2, 3, 1)


def to_cpu_layout(values: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
    """Canonical layout (`llmkern.formats.sparse24`) to the CPU kernel layout.

    Args:
        values: float32, bfloat16 or float16 [N, K/2].
        meta: uint8 [N, K/8].

    Returns:
        values [N/16, K/4, 32], meta int32 [N/16, K/32, 16]; large ones on huge pages where the system
        has them.

    Raises:
        ValueError: the shapes do not fit together, or N or K is no multiple of 16 and 32.
    """
    N, octets = check_parts("values", values, meta, 4)
    _expect_fit(N, 8 * octets)
    pairs = values.reshape(N // ROWS, ROWS, 2 * octets, 2).permute(_pair_order(values.dtype))
    out = empty_huge((N // ROWS, 2 * octets, 2 * ROWS), values.dtype)
    out.view(pairs.shape).copy_(pairs)
    return out, _words_to_blocks(meta.contiguous().view(torch.int32))


def from_cpu_layout(values: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
    """Exact inverse of `to_cpu_layout`.

    Raises:
        ValueError: the shapes do not fit together.
    """
    blocks, groups = values.shape[0], values.shape[1]
    if tuple(meta.shape) != (blocks, groups // 8, ROWS) or tuple(values.shape[2:]) != (2 * ROWS,):
        raise ValueError(
            f"values, meta: got {list(values.shape)} and {list(meta.shape)}, expected [N/16, K/4, 32] "
            "and [N/16, K/32, 16]"
        )
    order = _pair_order(values.dtype)
    shape = (blocks, groups, ROWS, 2) if order[3] == 3 else (blocks, groups, 2, ROWS)
    back = (0, 2, 1, 3) if order[3] == 3 else (0, 3, 1, 2)
    pairs = values.view(shape).permute(back)
    return pairs.reshape(blocks * ROWS, 2 * groups), _blocks_to_words(meta).view(torch.uint8)


def int4_to_cpu_layout(
    qvalues: Tensor, meta: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Canonical layout of 4-bit codes inside 2:4 to the CPU kernel layout.

    Args:
        qvalues: int32 [N, K/16].
        meta: uint8 [N, K/8].
        scales: [N, K/group_size], any float dtype, which is kept.
        zeros: int32 [ceil(N/8), K/group_size], or None.
        group_size: columns of the dense weight per scale, a multiple of 32.

    Returns:
        qvalues int32 [N/16, K/16, 16], meta int32 [N/16, K/32, 16], scales [K/group_size, N], zeros
        uint8 [K/group_size, N] or None; large ones on huge pages where the system has them.

    Raises:
        ValueError: group_size and the shapes do not fit together, or N is no multiple of 16.
    """
    check_codes(qvalues, meta, scales, group_size)
    N, groups = scales.shape
    K = groups * group_size
    _expect_fit(N, K)
    kernel_scales = empty_huge((groups, N), scales.dtype).copy_(scales.t())
    return (
        _words_to_blocks(_reorder(qvalues, _ORDER)),
        _words_to_blocks(meta.contiguous().view(torch.int32)),
        kernel_scales,
        None if zeros is None else unpack_zeros(zeros, 4, N).t().contiguous(),
    )


def int4_from_cpu_layout(
    qvalues: Tensor, meta: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Exact inverse of `int4_to_cpu_layout`.

    Raises:
        ValueError: group_size and the shapes do not fit together.
    """
    groups, N = scales.shape
    K = groups * group_size
    wanted = (N // ROWS, K // 16, ROWS), (N // ROWS, K // COLUMNS, ROWS)
    if (tuple(qvalues.shape), tuple(meta.shape)) != wanted:
        raise ValueError(
            f"qvalues, meta: got {list(qvalues.shape)} and {list(meta.shape)}, expected "
            f"{list(wanted[0])} and {list(wanted[1])} (N = {N}, K = {K})"
        )
    return (
        _reorder(_blocks_to_words(qvalues), _INVERSE),
        _blocks_to_words(meta).view(torch.uint8),
        scales.t().contiguous(),
        None if zeros is None else pack_bits(zeros, 4).t().contiguous(),
    )
