"""4-bit codes into a book of 16 values: NF4, FP4, or any table, with one scale per group.

    w[n, k] = scales[n, k // group_size] * codebook[.., codes[n, k]]

    qweight   int32 [N, K / 8]          code k of a row in nibble k % 8 of word k // 8, as int4's
    codebook  float32 [16]              one book for the whole weight,
              float32 [N, 16]           one per row, or
              float32 [N, groups, 16]   one per group
    scales    float [N, groups]         or None for the constant 1; groups = K / group_size

The codes are packed and unpacked by `llmkern.formats.int4` with bits = 4.

NF4 (QLoRA, arXiv 2305.14314, appendix E) are quantiles of the normal distribution, FP4 the 4-bit float
of bitsandbytes (sign, 2 bits of exponent, 1 of mantissa; its subnormal is 1/192, not 1/24). Both are
bitsandbytes' tables bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkern._dtypes import dtype_name
from llmkern.formats._format import Misfit, check_groups, groups_of

# Kernels read 32 codes at a time, all of one scale.
GROUP_UNIT = 32

# fmt: off
NF4_CODEBOOK = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])
# Code = sign, then 3 bits that bitsandbytes does not keep in order of magnitude; zero twice.
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4_CODEBOOK = torch.tensor([*_FP4_TWELFTHS, *(0.0 - v for v in _FP4_TWELFTHS)]) / 12
# fmt: on
# e2m1, the 4-bit float of the OCP formats: sign, 2 bits of exponent, 1 of mantissa.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_CODEBOOK = torch.tensor([*_E2M1, *(-value for value in _E2M1)])

CODEBOOKS = {"nf4": NF4_CODEBOOK, "fp4": FP4_CODEBOOK}
# Those of bitsandbytes, whose files hold these formats.
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class LutFormat:
    """How a weight is quantized to the entries of a book, in blocks of the flattened weight.

    Attributes:
        codebook: "nf4" or "fp4".
        block_size: elements per scale, one of `BLOCK_SIZES`.
    """

    codebook: str = "nf4"
    block_size: int = 64

    def __post_init__(self) -> None:
        if self.codebook not in CODEBOOKS:
            raise ValueError(f"codebook: got {self.codebook!r}, expected one of {tuple(CODEBOOKS)}")
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size: got {self.block_size}, expected one of {BLOCK_SIZES}")

    @property
    def bits(self) -> int:
        """Of a code."""
        return 4

    @property
    def symmetric(self) -> bool:
        """There are no zero points."""
        return True

    @property
    def book(self) -> Tensor:
        """The values of the codes, float32 [16]."""
        return CODEBOOKS[self.codebook]

    @property
    def scaled(self) -> bool:
        """Blocks have a scale."""
        return True

    def groups(self, K: int) -> int:
        """Elements per scale; blocks run across the ends of rows."""
        return self.block_size

    def misfit(self, N: int, K: int) -> Misfit | None:
        """Why a weight [N, K] cannot have this format, or None."""
        # Blocks run over the flattened weight; the kernels read 32 columns of a row at a time.
        shared = math.gcd(self.block_size, K)
        if shared % GROUP_UNIT == 0:
            return None
        why = f"splits {GROUP_UNIT} columns in rows of K = {K} (they share {shared})"
        return Misfit("group_size", self.block_size, why, f"K a multiple of {GROUP_UNIT}")

    def nbytes(self, N: int, K: int, itemsize: int, *, in_memory: bool) -> int:
        """Bytes of a weight [N, K] with its scales; see `WeightFormat.nbytes`."""
        return N * K // 2 + -(-N * K // self.block_size) * 4

    def to_dict(self) -> dict[str, Any]:
        """Its fields, ready for JSON and YAML."""
        return asdict(self)

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> LutFormat:
        """The inverse of `to_dict`."""
        return cls(**entry)


@dataclass(frozen=True, eq=False)
class CodebookFormat:
    """How a weight [N, K] is quantized to the entries of a book, in groups inside its rows.

    Attributes:
        codebook: float32 [16] for the whole weight, [N, 16] for each row or [N, groups, 16] for each
            group, in any order.
        group_size: K-elements per scale, or None for one scale per row.
        scaled: whether groups have a scale, absmax over the book's own; otherwise the book holds the
            weights' own values.
    """

    codebook: Tensor
    group_size: int | None = 64
    scaled: bool = True

    def __post_init__(self) -> None:
        if self.codebook.dtype != torch.float32 or self.codebook.shape[-1:] != (16,):
            raise ValueError(
                f"codebook: got {dtype_name(self.codebook.dtype)} "
                f"{list(self.codebook.shape)}, expected float32 [.., 16]"
            )
        if not bool(torch.isfinite(self.codebook).all()):
            raise ValueError("codebook: got NaN or Inf, expected finite entries")
        if self.scaled and not bool((self.codebook != 0).any(-1).all()):
            raise ValueError("codebook: got a book of zeros, which no scale can fit")
        check_groups(self.group_size)

    @property
    def bits(self) -> int:
        """Of a code."""
        return 4

    @property
    def symmetric(self) -> bool:
        """There are no zero points."""
        return True

    @property
    def book(self) -> Tensor:
        """The values of the codes."""
        return self.codebook

    def groups(self, K: int) -> int:
        """K-elements per scale for a weight with K columns.

        Raises:
            ValueError: the group size does not divide K.
        """
        return groups_of(self.group_size, K)


class Lut4Weight(NamedTuple):
    """A weight in the canonical layout.

    Attributes:
        qweight: int32 [N, K/8].
        codebook: float32 [16], [N, 16] or [N, K/group_size, 16].
        scales: float [N, K/group_size], or None.
        group_size: K-elements per scale.
        block_size: elements of the flattened weight per stored scale; None where it has no meaning.
        dtype: of the weight before it was quantized.
    """

    qweight: Tensor
    codebook: Tensor
    scales: Tensor | None
    group_size: int
    block_size: int | None
    dtype: torch.dtype


def codebook_name(codebook: Tensor) -> str | None:
    """ "nf4" or "fp4" if `codebook` is that table bit for bit, else None."""
    for name, table in CODEBOOKS.items():
        if codebook.shape == table.shape and torch.equal(codebook.cpu(), table):
            return name
    return None


def nearest_codes(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the entry of `codebook` nearest to each element of `x`.

    A tie goes to the smaller value, as in bitsandbytes; of equal entries the first is taken.

    Args:
        x: float32, any shape, without NaN.
        codebook: float32 [16], in any order.

    Returns:
        uint8, the shape of `x`.
    """
    values, order = codebook.sort(stable=True)
    first = order[torch.searchsorted(values, values)]
    ranks = torch.bucketize(x, (values[:-1] + values[1:]) / 2, out_int32=True)
    return first.to(torch.uint8)[ranks]


def quantize_blockwise(w: Tensor, codebook: Tensor, block: int = 64) -> tuple[Tensor, Tensor]:
    """Scale each block of the flattened weight to [-1, 1] and take the nearest entry of the book.

    Blocks run over the row-major weight, across the ends of rows, as in bitsandbytes; codes and
    scales are the same as its quantize_4bit's bit for bit (which may store an FP4 zero as its other
    zero).

    Args:
        w: float32, bfloat16 or float16 [N, K].
        codebook: float32 [16] in [-1, 1].
        block: elements per scale.

    Returns:
        codes uint8 [N, K], absmax float32 [ceil(N * K / block)].

    Raises:
        ValueError: NaN or Inf in the weight, or an argument that is not as above.
    """
    check_codebook(codebook)
    if codebook.dim() != 1:
        raise ValueError(f"codebook: got {list(codebook.shape)}, expected one book [16]")
    if w.dim() != 2 or not w.is_floating_point():
        raise ValueError(f"w: got {w.dtype} {list(w.shape)}, expected a float matrix [N, K]")
    if block <= 0:
        raise ValueError(f"block: got {block}, expected a positive number")
    if not bool(torch.isfinite(w).all()):
        raise ValueError("w: got NaN or Inf, expected finite weights")
    flat = w.reshape(-1).float()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    codes = nearest_codes(scaled, codebook.to(w.device))
    return codes.view(-1)[: len(flat)].view(w.shape), absmax


def group_size_of(block: int, K: int) -> int:
    """K-elements per scale that blocks of the flattened weight leave inside a row of K.

    Raises:
        ValueError: blocks would split what the kernels read at once.
    """
    group_size = math.gcd(block, K)
    if group_size % GROUP_UNIT:
        raise ValueError(
            f"block: got {block} for rows of K = {K}, expected blocks and rows that share a multiple "
            f"of {GROUP_UNIT} (they share {group_size}): a scale must cover {GROUP_UNIT} columns of "
            "a row"
        )
    return group_size


def group_scales(absmax: Tensor, block: int, shape: tuple[int, int]) -> Tensor:
    """Scales of blocks of the flattened weight, as scales of groups inside rows.

    Args:
        absmax: float [ceil(N * K / block)].
        block: elements per entry of absmax.
        shape: (N, K).

    Returns:
        [N, K / group_size] with group_size = `group_size_of(block, K)`.
    """
    N, K = shape
    group_size = group_size_of(block, K)
    groups = absmax.repeat_interleave(block // group_size)
    return groups[: N * K // group_size].view(N, -1).contiguous()


def block_scales(scales: Tensor, block: int, shape: tuple[int, int]) -> Tensor:
    """Inverse of `group_scales`: [N, K / group_size] to [ceil(N * K / block)].

    Raises:
        ValueError: the groups of a block have different scales.
    """
    repeats = block // group_size_of(block, shape[1])
    flat = scales.reshape(-1)
    absmax = flat[::repeats].contiguous()
    if not torch.equal(absmax.repeat_interleave(repeats)[: len(flat)], flat):
        raise ValueError(
            f"scales: got different scales inside blocks of {block}, expected one per block"
        )
    return absmax


def check_codebook(codebook: Tensor) -> None:
    """Refuse what is not a float32 table of 16 entries per tensor, row or group.

    Raises:
        ValueError: says what was given.
    """
    if codebook.dtype != torch.float32 or not 1 <= codebook.dim() <= 3 or codebook.shape[-1] != 16:
        raise ValueError(
            f"codebook: got {dtype_name(codebook.dtype)} {list(codebook.shape)}, "
            "expected float32 [16], [N, 16] or [N, K/group_size, 16]"
        )
