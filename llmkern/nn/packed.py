"""All packed modules, and which of them holds a format."""

from __future__ import annotations

from typing import Any

from llmkern.nn._packed_linear import PackedLinear
from llmkern.nn.int_linear import IntLinear
from llmkern.nn.lut4_linear import Lut4Linear
from llmkern.nn.sparse24_int4_linear import Sparse24Int4Linear
from llmkern.nn.sparse24_linear import Sparse24Linear

PACKED: list[type[PackedLinear]] = [IntLinear, Lut4Linear, Sparse24Linear, Sparse24Int4Linear]


def packed_class(fmt: Any) -> type[PackedLinear]:
    """The module that holds weights in a format.

    Raises:
        ValueError: there is none.
    """
    for kind in PACKED:
        if kind.FORMAT is type(fmt):
            return kind
    raise ValueError(f"format: got {fmt!r}, which no packed module holds")
