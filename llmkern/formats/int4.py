"""Packed layouts of low-bit integer weights: the canonical one, and helpers to pad to a kernel's K.

Canonical layout (compressed-tensors `pack-quantized`). With codes u in [0, 2^bits):

    w[n, k] = scales[n, k // group_size] * (u[n, k] - zeros[n, k // group_size])

    packed   int32 [N, ceil(K * bits / 32)]   row n is a bit stream: code k at bits k*bits ..,
                                              bit 0 = least significant bit of word 0
    scales   float [N, K / group_size]
    zeros    int32 [ceil(N * bits / 32), K / group_size]   the same stream, along N; absent when
                                              symmetric, which means the constant 2^(bits - 1)

    int4:  word 0 of a row = | u7 | u6 | u5 | u4 | u3 | u2 | u1 | u0 |   (u0 in bits 0..3)

All functions are pure torch and run on any device.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from llmkern.formats._format import Misfit, check_groups, groups_of

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class QuantFormat:
    """How a weight is quantized.

    Attributes:
        bits: weight bit width, 2, 3, 4 or 8.
        group_size: K-elements per scale, or None for one scale per row.
        symmetric: no zero points; codes are centred on 2^(bits - 1).
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits: got {self.bits}, expected one of {BITS}")
        check_groups(self.group_size)

    @property
    def book(self) -> None:
        """Codes are numbers, not places in a book."""
        return None

    def groups(self, K: int) -> int:
        """K-elements per scale for a weight with K columns.

        Raises:
            ValueError: the group size does not divide K.
        """
        return groups_of(self.group_size, K)

    def misfit(self, N: int, K: int) -> Misfit | None:
        """Why a weight [N, K] cannot have this format, or None."""
        size = self.group_size
        if size is None or K % size == 0:
            return None
        fits = [str(g) for g in (128, 64, 32) if K % g == 0] or ["None (one scale per row)"]
        return Misfit(
            "group_size", size, f"does not divide K = {K}", f"a divisor such as {fits[0]}"
        )

    def nbytes(self, N: int, K: int, itemsize: int, *, in_memory: bool) -> int:
        """Bytes of a weight [N, K] with all that belongs to it; see `WeightFormat.nbytes`."""
        # Kernels compute 2 and 3 bits as 4, and hold scales of 32.
        bits, scale = (4, 4) if in_memory else (self.bits, itemsize)
        groups = K // self.groups(K)
        zeros = 0 if self.symmetric else N * groups * bits // 8
        return N * -(-K * bits // 32) * 4 + N * groups * scale + zeros

    def to_dict(self) -> dict[str, Any]:
        """Its fields, ready for JSON and YAML."""
        return asdict(self)

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> QuantFormat:
        """The inverse of `to_dict`."""
        return cls(**entry)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last dimension into int32 words (dense bit stream).

    Args:
        codes: uint8 [N, K], values in [0, 2^bits).
        bits: 2, 3, 4 or 8.

    Returns:
        int32 [N, ceil(K * bits / 32)], unused high bits zero.

    Raises:
        ValueError: `codes` is not a uint8 matrix, or a code does not fit.
    """
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(f"codes: got {codes.dtype} {tuple(codes.shape)}, expected uint8 [N, K]")
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(
            f"codes: got a value of {int(codes.max())}, expected less than {1 << bits}"
        )
    return pack_bits(codes, bits)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """`pack_codes` for codes that are known to fit: reads no value, so it can be traced."""
    N, K = codes.shape
    words = -(-K * bits // 32)
    octets = torch.nn.functional.pad(codes, (0, -K % 32)).view(N, -1, 8)  # [N, K/8, 8]
    # Every bit width packs through bytes: 8 codes make `bits` bytes, little endian. One pass per code
    # keeps the wide temporaries at one element per 8 codes.
    stream = torch.zeros(octets.shape[:2], dtype=_stream_dtype(bits), device=codes.device)
    for i in range(8):
        stream |= octets[..., i].to(stream.dtype) << (i * bits)
    data = stream.view(torch.uint8).view(N, -1, stream.element_size())[..., :bits]
    return data.reshape(N, -1).view(torch.int32)[:, :words].contiguous()


def _stream_dtype(bits: int) -> torch.dtype:
    """The smallest integer that holds 8 codes."""
    return torch.int32 if bits <= 4 else torch.int64


def unpack_codes(packed: Tensor, bits: int, K: int) -> Tensor:
    """Exact inverse of `pack_codes`: int32 [N, ceil(K * bits / 32)] to uint8 [N, K].

    Raises:
        ValueError: `packed` is not int32 or has another number of words than K codes need.
    """
    words = -(-K * bits // 32)
    if packed.dtype != torch.int32 or packed.dim() != 2 or packed.shape[1] != words:
        raise ValueError(
            f"packed: got {packed.dtype} {tuple(packed.shape)}, expected int32 [N, {words}] for "
            f"K = {K} codes of {bits} bits"
        )
    N = packed.shape[0]
    octet_bytes = -(-K // 8) * bits
    data = torch.nn.functional.pad(packed.contiguous(), (0, 1)).view(torch.uint8)[:, :octet_bytes]
    dtype = _stream_dtype(bits)
    data = torch.nn.functional.pad(data.reshape(N, -1, bits), (0, dtype.itemsize - bits))
    stream = data.contiguous().view(N, -1).view(dtype)  # [N, K/8]
    codes = torch.empty(*stream.shape, 8, dtype=torch.uint8, device=packed.device)
    for i in range(8):
        codes[..., i] = (stream >> (i * bits)) & ((1 << bits) - 1)
    return codes.view(N, -1)[:, :K].contiguous()


def pack_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Zero points uint8 [N, groups] to the canonical int32 [ceil(N * bits / 32), groups]."""
    return pack_codes(zeros.t().contiguous(), bits).t().contiguous()


def unpack_zeros(packed: Tensor, bits: int, N: int) -> Tensor:
    """Exact inverse of `pack_zeros`: int32 [ceil(N * bits / 32), groups] to uint8 [N, groups]."""
    return unpack_codes(packed.t().contiguous(), bits, N).t().contiguous()


def check_canonical(qweight: Tensor, scales: Tensor, group_size: int) -> None:
    """Refuse a canonical weight whose parts do not fit together.

    Raises:
        ValueError: says what was given.
    """
    N, groups = scales.shape
    K = groups * group_size
    if group_size <= 0 or group_size % 32 or tuple(qweight.shape) != (N, K // 8):
        raise ValueError(
            f"group_size, qweight: got {group_size} and {list(qweight.shape)}, expected a multiple of "
            f"32 and [{N}, K/8] with K = {groups} groups of group_size"
        )
