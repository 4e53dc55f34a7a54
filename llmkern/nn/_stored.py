"""Packed linears as JSON and tensors, from which they are made again without computing anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.formats.bitsandbytes import Lut4Weight
from llmkern.formats.int4 import QuantFormat
from llmkern.nn._packed_linear import PackedLinear
from llmkern.nn.int4_linear import Int4Linear
from llmkern.nn.lut4_linear import Lut4Linear

_DTYPES = {str(d): d for d in (torch.float32, torch.bfloat16, torch.float16)}


def describe_packed(layer: PackedLinear) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `rebuild_packed` needs of a layer, its bias apart.

    Returns:
        A description, ready for JSON, and tensors by name; the layer stays as it is.

    Raises:
        ValueError: a class of layers that no driver makes.
    """
    entry: dict[str, Any] = {"class": type(layer).__name__, "dtype": str(layer.dtype)}
    if isinstance(layer, Int4Linear):
        fmt = layer.format
        entry |= {"in_features": layer.in_features, "bits": fmt.bits}
        entry |= {"group_size": fmt.group_size, "symmetric": fmt.symmetric}
    elif isinstance(layer, Lut4Linear):
        entry |= {"group_size": layer.group_size, "block_size": layer.block_size}
    else:
        raise ValueError(
            f"layer: got {type(layer).__name__}, expected an Int4Linear or a Lut4Linear"
        )
    return entry, {k: t for k, t in layer._file_tensors().items() if t is not None}


def rebuild_packed(
    entry: Mapping[str, Any], tensors: Mapping[str, Tensor], bias: nn.Parameter | None
) -> PackedLinear:
    """The layer that `describe_packed` described.

    Args:
        entry, tensors: as it returned them.
        bias: the layer's; kept as it is.

    Raises:
        ValueError: tensors that do not fit the description (named).
    """
    dtype = _DTYPES[entry["dtype"]]
    packed, scales = tensors["weight_packed"], tensors.get("weight_scale")
    if entry["class"] == "Lut4Linear":
        sizes = entry["group_size"], entry["block_size"]
        return Lut4Linear(
            Lut4Weight(packed, tensors["weight_codebook"], scales, *sizes, dtype), bias
        )
    return Int4Linear.from_packed(
        packed,
        tensors["weight_scale"],
        tensors.get("weight_zero_point"),
        bias,
        in_features=entry["in_features"],
        format=QuantFormat(entry["bits"], entry["group_size"], entry["symmetric"]),
        dtype=dtype,
    )
