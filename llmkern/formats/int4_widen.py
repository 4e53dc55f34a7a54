"""What the 4-bit kernels read, from weights that they cannot read as they are, and back, exactly.

The kernels hold codes of 4 bits in groups whose size is a multiple of 32. Any other canonical weight
of 2, 3 or 4 bits is brought to that form without changing a value:

- narrower codes move to the middle of the 4-bit range, u4 = u + 8 - 2^(bits-1), and zero points with
  them, so that u4 - z4 = u - z and the symmetric centre becomes 8;
- each group is padded with codes to the next multiple of 32, and x with zeros at the same columns.

    group_size 16:   | u0 .. u15  8 x 16 | u16 .. u31  8 x 16 | ...
                     | x0 .. x15  0 x 16 | x16 .. x31  0 x 16 | ...
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.formats.int4 import pack_bits, unpack_codes, unpack_zeros

_GROUP_UNIT = 32
_CENTRE = 8


def padded_group_size(group_size: int) -> int:
    """The group size that the kernels see: the next multiple of 32."""
    return -(-group_size // _GROUP_UNIT) * _GROUP_UNIT


def is_wide(bits: int, group_size: int) -> bool:
    """Whether the kernels read the canonical tensors of such a weight as they are."""
    return bits == 4 and group_size % _GROUP_UNIT == 0


def widen(
    packed: Tensor, zeros: Tensor | None, bits: int, group_size: int, shape: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    """Canonical tensors to 4-bit codes in padded groups.

    Args:
        packed: int32 [N, ceil(K * bits / 32)].
        zeros: int32 [ceil(N * bits / 32), K / group_size], or None when symmetric.
        bits: 2, 3 or 4.
        group_size: K-elements per scale, any divisor of K.
        shape: (N, K).

    Returns:
        int32 [N, groups * padded_group_size / 8], and zeros int32 [ceil(N / 8), groups] or None.
    """
    N, K = shape
    shift = _CENTRE - (1 << (bits - 1))
    codes = unpack_codes(packed, bits, K).view(N, -1, group_size) + shift
    padding = padded_group_size(group_size) - group_size
    codes = torch.nn.functional.pad(codes, (0, padding), value=_CENTRE)
    wide_zeros = None if zeros is None else _pack_zeros(unpack_zeros(zeros, bits, N) + shift, 4)
    return pack_bits(codes.view(N, -1), 4), wide_zeros


def narrow(
    qweight: Tensor, zeros: Tensor | None, bits: int, group_size: int, shape: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    """Exact inverse of `widen`; `bits`, `group_size` and `shape` are those of the canonical weight."""
    N, K = shape
    shift = _CENTRE - (1 << (bits - 1))
    padded = padded_group_size(group_size)
    codes = unpack_codes(qweight, 4, K // group_size * padded).view(N, -1, padded)
    codes = codes[..., :group_size].reshape(N, K) - shift
    narrow_zeros = None if zeros is None else _pack_zeros(unpack_zeros(zeros, 4, N) - shift, bits)
    return pack_bits(codes, bits), narrow_zeros


def _pack_zeros(zeros: Tensor, bits: int) -> Tensor:
    return pack_bits(zeros.t(), bits).t().contiguous()


def pad_activations(x: Tensor, group_size: int) -> Tensor:
    """x [..., K] with zeros at the columns that `widen` added; x itself where it added none."""
    padding = padded_group_size(group_size) - group_size
    if not padding:
        return x
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // group_size, group_size)
    return torch.nn.functional.pad(groups, (0, padding)).flatten(-2)
