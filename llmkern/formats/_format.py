"""What every weight format answers for itself, so that nothing else asks which one it holds."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol


class Misfit(NamedTuple):
    """Why a weight cannot have a format; `str` is one phrase.

    Attributes:
        option: field of the format that does not fit: "group_size".
        got: its value.
        why: "does not divide K = 100".
        wanted: "a divisor such as 32".
    """

    option: str
    got: Any
    why: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.option} = {self.got} {self.why}"


class WeightFormat(Protocol):
    """How a weight [N, K] is quantized: a frozen dataclass.

    Attributes:
        bits: of a code.
        symmetric: codes stand around zero; no zero points are stored.
    """

    @property
    def bits(self) -> int: ...

    @property
    def symmetric(self) -> bool: ...

    def groups(self, K: int) -> int:
        """Elements per scale, for a weight with K columns."""

    def misfit(self, N: int, K: int) -> Misfit | None:
        """Why a weight [N, K] cannot have this format, or None."""

    def nbytes(self, N: int, K: int, itemsize: int, *, in_memory: bool) -> int:
        """Bytes of a weight [N, K] in this format.

        Args:
            N, K: out and in features; the format fits them.
            itemsize: bytes of an element of the dense weight, and so of stored scales.
            in_memory: as the kernels hold it; otherwise as a checkpoint does.
        """

    def to_dict(self) -> dict[str, Any]:
        """Its fields, ready for JSON and YAML; `from_dict` of its class reads them."""


def check_groups(group_size: int | None) -> None:
    """Refuse a number of elements per scale that is none.

    Raises:
        ValueError: it is not positive (None is one scale per row).
    """
    if group_size is not None and group_size <= 0:
        raise ValueError(
            f"group_size: got {group_size}, expected a positive number, or None for one scale per row"
        )


def groups_of(group_size: int | None, K: int) -> int:
    """K-elements per scale for a weight with K columns.

    Raises:
        ValueError: the group size does not divide K.
    """
    size = group_size or K
    if K % size:
        raise ValueError(f"group_size: got {size}, expected a divisor of K = {K}")
    return size
