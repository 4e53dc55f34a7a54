"""What `bits`, `group_size` and `symmetric` mean to a method, and how its rules are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from llmkern.formats import LutFormat, QuantFormat, WeightFormat
from llmkern.nn import packed_class

# Groups that are tried where K is no multiple of 128.
_SMALLER = (64, 32)

GroupSize = int | Literal["auto"] | None


class Formats:
    """The formats of a method.

    Attributes:
        rule: keys of a rule in a recipe, fields of the format or names of `quantize`'s arguments.
        written: how a rule's format is written on the command line: "BITS[:GROUP]".
    """

    rule: ClassVar[tuple[str, ...]]
    written: ClassVar[str]

    def choose(self, bits: int, group_size: GroupSize, symmetric: bool) -> WeightFormat:
        """The format that `quantize`'s arguments ask for.

        Raises:
            ValueError: there is none; names the argument.
            NotImplementedError: no packed layer holds it.
        """
        raise NotImplementedError

    def fitted(self, fmt: Any, N: int, K: int) -> WeightFormat | str:
        """What a weight [N, K] gets where the group size was left to us: `fmt`, or the next that fits.

        Where none does, it is the reason.
        """
        odd = fmt.misfit(N, K)
        return fmt if odd is None else f"{odd.option} {odd.got} {odd.why}"

    def parse(self, text: str, common: Mapping[str, Any]) -> WeightFormat | None:
        """The format of a rule on the command line; None where it is written in another way.

        Args:
            text: as `written` says.
            common: the arguments for all layers, where they were given.
        """
        raise NotImplementedError

    def label(self, options: Mapping[str, Any]) -> str:
        """What a stage's label says of them: " 4 bits"."""
        return ""


def check_held(fmt: WeightFormat, argument: str) -> None:
    """Refuse a format that no packed layer holds.

    Raises:
        NotImplementedError: names the argument.
    """
    odd = packed_class(fmt).refuse(fmt)
    if odd is not None:
        raise NotImplementedError(
            f"{argument}: got {odd.got} {odd.option}, expected {odd.wanted}: no packed linear layer "
            "holds others yet"
        )


@dataclass(frozen=True)
class IntFormats(Formats):
    """Integer codes with a scale, and perhaps a zero point, per group or row: `QuantFormat`."""

    rule: ClassVar[tuple[str, ...]] = ("bits", "group_size", "symmetric")
    written: ClassVar[str] = "BITS[:GROUP]"

    def choose(self, bits: int, group_size: GroupSize, symmetric: bool) -> QuantFormat:
        """See `Formats`."""
        fmt = QuantFormat(bits, 128 if group_size == "auto" else group_size, symmetric)
        check_held(fmt, "bits")
        return fmt

    def fitted(self, fmt: QuantFormat, N: int, K: int) -> QuantFormat | str:
        """See `Formats`: groups of 64 or 32 in place of 128, else one scale per row."""
        if fmt.misfit(N, K) is None:
            return fmt
        size = next((size for size in _SMALLER if K % size == 0), None)
        return dataclasses.replace(fmt, group_size=size)

    def parse(self, text: str, common: Mapping[str, Any]) -> QuantFormat | None:
        """See `Formats`; -1 is one scale per row."""
        width, _, size = text.partition(":")
        if not width.isdigit() or (size and not size.lstrip("-").isdigit()):
            return None
        group = int(size) if size else common.get("group_size", 128)
        group = None if group == -1 else 128 if group == "auto" else group
        return QuantFormat(int(width), group, common.get("symmetric", True))

    def label(self, options: Mapping[str, Any]) -> str:
        """See `Formats`."""
        return f" {options.get('bits', 4)} bits"


@dataclass(frozen=True)
class TableFormats(Formats):
    """Codes into one of bitsandbytes' tables, in blocks of the flattened weight: `LutFormat`.

    Attributes:
        table: "nf4" or "fp4", the method's name.
        block_size: elements per scale that bitsandbytes takes by default.
    """

    table: str
    block_size: int = 64

    rule: ClassVar[tuple[str, ...]] = ("block_size",)
    written: ClassVar[str] = "4:BLOCK"

    def choose(self, bits: int, group_size: GroupSize, symmetric: bool) -> LutFormat:
        """See `Formats`."""
        if bits != 4 or not symmetric:
            got = f"bits: got {bits}" if bits != 4 else f"symmetric: got {symmetric}"
            raise ValueError(
                f"{got}, expected {4 if bits != 4 else True} for method {self.table!r}"
            )
        if group_size is None:
            raise ValueError(
                f"group_size: got None, expected a block size for method {self.table!r}"
            )
        return LutFormat(self.table, self.block_size if group_size == "auto" else group_size)

    def parse(self, text: str, common: Mapping[str, Any]) -> LutFormat | None:
        """See `Formats`."""
        width, _, size = text.partition(":")
        return LutFormat(self.table, int(size)) if width == "4" and size.isdigit() else None
