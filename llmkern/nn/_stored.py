"""Packed linears as JSON and tensors, from which they are made again without computing anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from llmkern._dtypes import FLOATS_BY_NAME
from llmkern.nn._packed_linear import PackedLinear
from llmkern.nn.packed import PACKED


def describe_packed(layer: PackedLinear) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `rebuild_packed` needs of a layer, its bias apart.

    Returns:
        A description, ready for JSON, and tensors by name; the layer stays as it is.

    Raises:
        ValueError: a class of layers that no driver makes.
    """
    entry, tensors = layer.stored()
    return {"class": type(layer).__name__, "dtype": str(layer.dtype), **entry}, tensors


def rebuild_packed(
    entry: Mapping[str, Any], tensors: Mapping[str, Tensor], bias: nn.Parameter | None
) -> PackedLinear:
    """The layer that `describe_packed` described.

    Args:
        entry, tensors: as it returned them.
        bias: the layer's; kept as it is.

    Raises:
        ValueError: tensors that do not fit the description (named), or a class that there is not.
    """
    kinds = {kind.__name__: kind for kind in PACKED}
    if entry["class"] not in kinds:
        raise ValueError(f"class: got {entry['class']!r}, expected one of {', '.join(kinds)}")
    kind = kinds[entry["class"]]
    dtype = FLOATS_BY_NAME[entry["dtype"].removeprefix("torch.")]
    return kind.from_stored({**entry, "dtype": dtype}, tensors, bias)
