"""Kernel layout of a 4-bit weight on the CPU, and its exact inverse to the canonical one.

N is cut into blocks of 64 rows (the last one padded with code 0), K into quads of 4 columns. A block's
quads follow one another, 128 bytes each, so that a kernel that produces 64 outputs reads one stream:

    qweight  uint8 [ceil(N / 64), K * 32]        block n // 64, quad k // 4 at bytes 128 * (k // 4) ..

    one quad (columns 4q .. 4q + 3), as 32 dwords of 4 bytes, byte i = column 4q + i:

        dword      0           1              15          16              31
               +-----------+-----------+   +-----------+-----------+   +-----------+
      high 4   | row 16    | row 17    |...| row 31    | row 48    |...| row 63    |
      low  4   | row  0    | row  1    |...| row 15    | row 32    |...| row 47    |
               +-----------+-----------+   +-----------+-----------+   +-----------+
      bytes      0 1 2 3     4 5 6 7        60 .. 63     64 .. 67      124 .. 127

    scales   float [K / group_size, N]           transposed: the scales of a block's rows adjoin
    zeros    uint8 [K / group_size, N]           one byte each; absent when symmetric (constant 8)

A dword is what a dot-product instruction (vpdpbusd, vpmaddubsw) consumes per output, so unpacking is
one AND, or one shift and one AND, in vectors of any width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern._memory import empty_huge
from llmkern.formats.int4 import check_canonical, pack_zeros, unpack_zeros

BLOCK = 64
_NIBBLES = 0x0F0F0F0F


def to_cpu_layout(
    qweight: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Canonical layout (`llmkern.formats.int4`) to the CPU kernel layout.

    Args:
        qweight: int32 [N, K/8].
        scales: float [N, K/group_size], any float dtype, which is kept.
        zeros: int32 [ceil(N/8), K/group_size], or None.
        group_size: K-elements per scale, a multiple of 32.

    Returns:
        qweight uint8 [ceil(N/64), K*32], scales [K/group_size, N], zeros uint8 [K/group_size, N] or
        None; large ones on huge pages where the system has them.

    Raises:
        ValueError: group_size and the shapes do not fit together.
    """
    check_canonical(qweight, scales, group_size)
    N, groups = scales.shape
    K = groups * group_size
    blocks, quads = -(-N // BLOCK), K // 4
    octets = torch.nn.functional.pad(qweight, (0, 0, 0, -N % BLOCK)).view(torch.uint8)
    codes = torch.stack((octets & 15, octets >> 4), -1)  # [blocks * 64, K/2, 2], one byte per code
    dwords = codes.view(blocks, 2, 2, 16, K).view(
        torch.int32
    )  # [.., quads], rows (half, high, lane)
    packed = dwords[:, :, 0] | dwords[:, :, 1] << 4  # [blocks, 2, 16, quads]
    out = empty_huge((blocks, K * 32), torch.uint8)
    out.view(torch.int32).view(blocks, quads, 2, 16).copy_(packed.permute(0, 3, 1, 2))
    kernel_zeros = None if zeros is None else unpack_zeros(zeros, 4, N).t().contiguous()
    kernel_scales = empty_huge((groups, N), scales.dtype).copy_(scales.t())
    return out, kernel_scales, kernel_zeros


def from_cpu_layout(
    qweight: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Exact inverse of `to_cpu_layout`.

    Args:
        qweight: uint8 [ceil(N/64), K*32].
        scales: float [K/group_size, N].
        zeros: uint8 [K/group_size, N], or None.
        group_size: K-elements per scale, a multiple of 32.

    Returns:
        qweight int32 [N, K/8], scales [N, K/group_size], zeros int32 [ceil(N/8), K/group_size] or None.

    Raises:
        ValueError: group_size and the shapes do not fit together.
    """
    groups, N = scales.shape
    K = groups * group_size
    blocks, quads = -(-N // BLOCK), K // 4
    if group_size <= 0 or group_size % 32 or tuple(qweight.shape) != (blocks, K * 32):
        raise ValueError(
            f"group_size, qweight: got {group_size} and {list(qweight.shape)}, expected a multiple of "
            f"32 and [{blocks}, K * 32] with K = {groups} groups of group_size"
        )
    packed = qweight.view(torch.int32).view(blocks, quads, 2, 16).permute(0, 2, 3, 1)
    dwords = torch.stack(
        (packed & _NIBBLES, packed >> 4 & _NIBBLES), 2
    )  # [blocks, 2, 2, 16, quads]
    codes = dwords.view(torch.uint8).view(blocks * BLOCK, K // 2, 2)[:N]
    octets = codes[..., 0] | codes[..., 1] << 4
    canonical_zeros = None if zeros is None else pack_zeros(zeros.t().contiguous(), 4)
    return octets.view(torch.int32), scales.t().contiguous(), canonical_zeros
