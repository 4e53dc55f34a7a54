"""Kernel layout of a look-up-table weight on the CPU, and its exact inverse to the canonical one.

Rows stay rows, so that a book and the scales may change with the row and the group; 32 consecutive
codes of a row, 16 bytes, are reordered for vectors whose lanes run along K:

    qweight  uint8 [N, K / 2]

    16 bytes (columns 32u .. 32u + 31):   byte i = | code 16 + i | code i |   (code i in the low nibble)

One widening load makes 16 dwords of it; they index the book as they are, and again shifted right by 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern._memory import empty_huge


def to_cpu_layout(qweight: Tensor) -> Tensor:
    """Canonical int32 [N, K/8], K a multiple of 32, to uint8 [N, K/2].

    Raises:
        ValueError: `qweight` is not such a matrix.
    """
    if qweight.dtype != torch.int32 or qweight.dim() != 2 or qweight.shape[1] % 4:
        raise ValueError(
            f"qweight: got {qweight.dtype} {list(qweight.shape)}, expected int32 [N, K/8] with K a "
            "multiple of 32"
        )
    N, words = qweight.shape
    octets = qweight.contiguous().view(torch.uint8).view(N, words // 4, 2, 8)
    low, high = octets[:, :, 0], octets[:, :, 1]  # codes 0..15 and 16..31 of each unit
    out = empty_huge((N, words * 4), torch.uint8)
    units = out.view(N, words // 4, 8, 2)
    units[..., 0] = low & 15 | high << 4
    units[..., 1] = low >> 4 | high & 240
    return out


def from_cpu_layout(qweight: Tensor) -> Tensor:
    """Exact inverse of `to_cpu_layout`: uint8 [N, K/2] to int32 [N, K/8].

    Raises:
        ValueError: `qweight` is not such a matrix.
    """
    if qweight.dtype != torch.uint8 or qweight.dim() != 2 or qweight.shape[1] % 16:
        raise ValueError(
            f"qweight: got {qweight.dtype} {list(qweight.shape)}, expected uint8 [N, K/2] with K a "
            "multiple of 32"
        )
    units = qweight.view(len(qweight), qweight.shape[1] // 16, 8, 2)
    even, odd = units[..., 0], units[..., 1]
    octets = torch.stack((even & 15 | odd << 4, even >> 4 | odd & 240), 2)
    return octets.view(torch.int32).view(len(qweight), qweight.shape[1] // 4)
