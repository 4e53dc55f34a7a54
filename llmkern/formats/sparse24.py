"""2:4 sparse weights: of every 4 consecutive columns of a row, two are kept.

Canonical layout. Group g of a row is its columns 4g .. 4g + 3; kept columns stay in ascending order:

    values   float [N, K/2]     the kept values of row n, two per group
    meta     uint8 [N, K/8]     one nibble per group, the low nibble of a byte the lower group

    nibble   bits 1:0 = place of the first kept column in its group, bits 3:2 = of the second:

             kept   0 1   0 2   1 2   0 3   1 3   2 3
             code   0x4   0x8   0x9   0xC   0xD   0xE

as mma.sp of NVIDIA's tensor cores reads it. 4-bit codes inside 2:4 have the same `meta`, and:

    qvalues  int32 [N, K/16]             8 kept codes a word, the first in bits 0..3 (as in int4.py)
    scales   float [N, K/group_size]     group_size counts columns of the dense weight
    zeros    int32 [ceil(N/8), K/group_size], packed as in int4.py, or None: the constant 8

    w[n, k] = scales * (code - zeros) where k is kept, else 0

What is kept is a mask of its own: a kept value may be 0, a kept code any of 0 .. 15, and what is pruned
is not stored. A group that keeps fewer than two columns is filled up with its lowest columns that are
not kept, as value 0 or as the code that is the zero point; a group that keeps more is refused.

K is a multiple of 8 (16 for codes). A narrower matrix is padded by its owner with pruned columns, and
x with zeros.

All functions are pure torch and run on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern._dtypes import FLOATS, dtype_name
from llmkern.formats.int4 import pack_codes, unpack_codes

# Fewer zeros than this, and a weight that happens to fit the pattern is no pruned one.
LEAST_SPARSITY = 0.45
# The nibble of each set of kept columns, as bits of the index: 0b0011 keeps columns 0 and 1.
_NIBBLES = {0b0011: 0x4, 0b0101: 0x8, 0b0110: 0x9, 0b1001: 0xC, 0b1010: 0xD, 0b1100: 0xE}
NIBBLES = tuple(_NIBBLES.values())
# Two columns for each set of at most two, filled up from the lowest; -1 for larger sets.
_FILLED = (3, 3, 3, 3, 5, 5, 6, -1, 9, 9, 10, -1, 12, -1, -1, -1)


def _lookup(entries: dict[int, int], index: Tensor) -> Tensor:
    table = [entries.get(i, 0) for i in range(16)]
    return torch.tensor(table, dtype=torch.uint8, device=index.device)[index.int()]


def _check_matrix(name: str, t: Tensor, dtypes: tuple[torch.dtype, ...], unit: int) -> None:
    if t.dim() != 2 or t.dtype not in dtypes or t.shape[1] % unit:
        kinds = " or ".join(map(dtype_name, dtypes))
        raise ValueError(
            f"{name}: got {dtype_name(t.dtype)} {list(t.shape)}, expected {kinds} "
            f"[N, K] with K a multiple of {unit}"
        )


def _kept(mask: Tensor, name: str) -> Tensor:
    """Set of kept columns of each group as 4 bits, uint8 [N, K/4], filled up to two."""
    N, K = mask.shape
    bits = torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=mask.device)
    sets = (mask.view(N, K // 4, 4) * bits).sum(-1, dtype=torch.uint8)
    filled = torch.tensor(_FILLED, dtype=torch.int8, device=mask.device)[sets.int()]
    bad = filled < 0
    if bool(bad.any()):
        row, group = divmod(int(bad.view(-1).int().argmax()), K // 4)
        count = int(mask[row, 4 * group : 4 * group + 4].sum())
        raise ValueError(
            f"{name}: got {count} kept of 4 in row {row}, columns {4 * group} .. {4 * group + 3}, "
            "expected at most 2 of every 4 columns (2:4 sparsity)"
        )
    return filled.to(torch.uint8)


def _gather_kept(dense: Tensor, sets: Tensor) -> tuple[Tensor, Tensor]:
    """(kept elements [N, K/2], meta) of `dense` for the sets of kept columns."""
    N, K = dense.shape
    nibbles = _lookup(_NIBBLES, sets)
    places = torch.stack((nibbles & 3, nibbles >> 2), -1).long()
    values = dense.reshape(N, K // 4, 4).gather(2, places).view(N, K // 2)
    pairs = nibbles.view(N, K // 8, 2)
    return values, pairs[..., 0] | pairs[..., 1] << 4


def _check_mask(mask: Tensor, shape: torch.Size) -> None:
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(
            f"mask: got {dtype_name(mask.dtype)} {list(mask.shape)}, expected bool {list(shape)}"
        )


def compress(w: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A dense weight to its kept values and metadata.

    Args:
        w: float32, bfloat16 or float16 [N, K], K a multiple of 8.
        mask: bool [N, K], true where a column is kept; by default where w is not 0. What it prunes
            is dropped, whatever its value.

    Returns:
        values [N, K/2] in w's dtype, meta uint8 [N, K/8].

    Raises:
        ValueError: a dtype or shape is not as above; more than two of some 4 columns are kept (the
            first such row and its columns are named).
    """
    _check_matrix("w", w, FLOATS, 8)
    if mask is None:
        return _gather_kept(w, _kept(w != 0, "w"))
    _check_mask(mask, w.shape)
    sets = _kept(mask, "mask")
    return _gather_kept(torch.where(mask, w, torch.zeros_like(w)), sets)


def decompress(values: Tensor, meta: Tensor) -> Tensor:
    """Exact inverse of `compress`: the dense weight [N, K] in values' dtype, 0 where pruned.

    Raises:
        ValueError: the shapes do not fit together.
    """
    N, octets = check_parts("values", values, meta, 4)
    dense = values.new_zeros(N, 2 * octets, 4)
    return dense.scatter_(2, kept_places(meta), values.reshape(N, 2 * octets, 2)).view(
        N, 8 * octets
    )


def check_parts(name: str, t: Tensor, meta: Tensor, per_octet: int) -> tuple[int, int]:
    """(N, K/8) of a canonical weight whose `t` has `per_octet` elements per 8 columns."""
    N, octets = meta.shape if meta.dim() == 2 else (0, -1)
    if meta.dtype != torch.uint8 or tuple(t.shape) != (N, octets * per_octet):
        raise ValueError(
            f"{name}, meta: got {list(t.shape)} and {dtype_name(meta.dtype)} "
            f"{list(meta.shape)}, expected [N, K/{8 // per_octet}] and uint8 [N, K/8]"
        )
    return N, octets


def kept_places(meta: Tensor) -> Tensor:
    """Places of the two kept columns in each group, int64 [N, K/4, 2] of 0 .. 3."""
    nibbles = torch.stack((meta & 15, meta >> 4), -1).flatten(1)
    return torch.stack((nibbles & 3, nibbles >> 2), -1).long()


def mask_of(meta: Tensor) -> Tensor:
    """What `meta` keeps, bool [N, K]; groups that were filled up count as they are stored."""
    N, octets = meta.shape
    mask = torch.zeros(N, 2 * octets, 4, dtype=torch.bool, device=meta.device)
    return mask.scatter_(2, kept_places(meta), True).view(N, 8 * octets)


def check_meta(meta: Tensor) -> None:
    """Refuse metadata that holds another nibble than the six.

    Raises:
        ValueError: names the first such row and its columns.
    """
    valid = torch.zeros(16, dtype=torch.bool, device=meta.device)
    valid[list(NIBBLES)] = True
    nibbles = torch.stack((meta & 15, meta >> 4), -1).flatten(1)
    bad = ~valid[nibbles.int()]
    if bool(bad.any()):
        row, group = divmod(int(bad.view(-1).int().argmax()), nibbles.shape[1])
        raise ValueError(
            f"meta: got {int(nibbles[row, group]):#x} in row {row}, columns {4 * group} .. "
            f"{4 * group + 3}, expected one of {', '.join(hex(n) for n in NIBBLES)}"
        )


def is_sparse24(w: Tensor) -> bool:
    """Whether at most two of every 4 columns of a matrix are not 0, K a multiple of 8."""
    if w.dim() != 2 or w.shape[1] % 8:
        return False
    return bool(((w != 0).view(len(w), w.shape[1] // 4, 4).sum(-1, dtype=torch.uint8) <= 2).all())


def is_pruned24(w: Tensor) -> bool:
    """Whether a matrix, float or uint8, is 2:4 sparse with as many zeros as pruning leaves."""
    if w.is_meta or w.numel() == 0 or (w.dtype not in FLOATS and w.dtype != torch.uint8):
        return False
    if int((w == 0).sum()) < LEAST_SPARSITY * w.numel():
        return False
    return is_sparse24(w)


def compress_codes(
    codes: Tensor, mask: Tensor, zeros: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """4-bit codes of a dense weight to the kept ones, packed, and metadata.

    Args:
        codes: uint8 [N, K] below 16, K a multiple of 16.
        mask: bool [N, K], true where a column is kept.
        zeros: uint8 [N, K/group_size] zero points, or None for the constant 8: the code with which
            groups that keep fewer than two are filled up.

    Returns:
        qvalues int32 [N, K/16], meta uint8 [N, K/8].

    Raises:
        ValueError: as `compress`; a code that does not fit; zeros of another shape.
    """
    _check_matrix("codes", codes, (torch.uint8,), 16)
    _check_mask(mask, codes.shape)
    sets = _kept(mask, "mask")
    kept, meta = _gather_kept(torch.where(mask, codes, _fill(zeros, codes.shape)), sets)
    return pack_codes(kept, 4), meta


def _fill(zeros: Tensor | None, shape: torch.Size) -> Tensor:
    """The code of a pruned element, broadcast over [N, K]."""
    N, K = shape
    if zeros is None:
        return torch.tensor(8, dtype=torch.uint8)
    if zeros.dim() != 2 or len(zeros) != N or not zeros.shape[1] or K % zeros.shape[1]:
        raise ValueError(f"zeros: got {list(zeros.shape)}, expected uint8 [{N}, K/group_size]")
    return zeros.repeat_interleave(K // zeros.shape[1], 1)


def decompress_codes(
    qvalues: Tensor, meta: Tensor, zeros: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Exact inverse of `compress_codes`: codes uint8 [N, K], the zero point where pruned, and the mask.

    Raises:
        ValueError: the shapes do not fit together.
    """
    N, octets = meta.shape
    if qvalues.dtype != torch.int32 or tuple(qvalues.shape) != (N, octets // 2) or octets % 2:
        raise ValueError(
            f"qvalues, meta: got {list(qvalues.shape)} and {list(meta.shape)}, expected int32 "
            "[N, K/16] and uint8 [N, K/8]"
        )
    kept = unpack_codes(qvalues, 4, 4 * octets).view(N, 2 * octets, 2)
    fill = _fill(zeros, torch.Size((N, 8 * octets))).to(meta.device)
    dense = fill.expand(N, 8 * octets).contiguous().view(N, 2 * octets, 4)
    dense = dense.scatter(2, kept_places(meta), kept)
    return dense.view(N, 8 * octets), mask_of(meta)


def check_codes(qvalues: Tensor, meta: Tensor, scales: Tensor, group_size: int) -> None:
    """Refuse a canonical weight of codes whose parts do not fit together.

    Raises:
        ValueError: says what was given.
    """
    N, groups = scales.shape
    K = groups * group_size
    shapes = (tuple(qvalues.shape), tuple(meta.shape))
    if group_size <= 0 or group_size % 32 or shapes != ((N, K // 16), (N, K // 8)):
        raise ValueError(
            f"group_size, qvalues, meta: got {group_size}, {list(qvalues.shape)} and "
            f"{list(meta.shape)}, expected a multiple of 32, [{N}, K/16] and [{N}, K/8] with K = "
            f"{groups} groups of group_size"
        )
