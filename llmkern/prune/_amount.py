"""How much to remove: a fraction, or n kept of every m."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

MAX_M = 8


@dataclass(frozen=True)
class Pattern:
    """Of every m consecutive columns of a row at most n are non-zero.

    Attributes:
        n: kept.
        m: of how many; at most 8.
    """

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """Fraction removed."""
        return 1 - self.n / self.m


Amount = float | Pattern


def parse_pattern(value: Any, argument: str = "pattern") -> Pattern:
    """A `Pattern` from "2:4", (2, 4) or itself.

    Raises:
        ValueError: it is none of these, or not 1 <= n < m <= 8; names `argument`.
    """
    numbers: Any = None
    if isinstance(value, Pattern):
        numbers = (value.n, value.m)
    elif isinstance(value, str) and re.fullmatch(r"\d+:\d+", value):
        numbers = tuple(int(part) for part in value.split(":"))
    elif isinstance(value, tuple | list) and [type(part) for part in value] == [int, int]:
        numbers = tuple(value)
    if numbers is None or not 1 <= numbers[0] < numbers[1] <= MAX_M:
        raise ValueError(
            f"{argument}: got {value!r}, expected n kept of m with 1 <= n < m <= {MAX_M}, such as '2:4'"
        )
    return Pattern(*numbers)


def check_fraction(value: Any, argument: str) -> float:
    """`value` as a fraction in [0, 1).

    Raises:
        ValueError: it is none; names `argument`.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{argument}: got {value!r}, expected a fraction in [0, 1)")
    return float(value)
