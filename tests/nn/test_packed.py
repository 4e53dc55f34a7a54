"""The list of packed modules: which holds a format, and how each is made again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmkern.formats import LutFormat, QuantFormat
from llmkern.nn import PACKED, IntLinear, Lut4Linear, Sparse24Linear, is_packed, packed_class
from llmkern.nn._stored import describe_packed, rebuild_packed

FORMATS = {IntLinear: QuantFormat(3, 32, symmetric=False), Lut4Linear: LutFormat("fp4", 64)}


def test_each_format_has_one_module() -> None:
    assert {kind: packed_class(fmt) for kind, fmt in FORMATS.items()} == {k: k for k in FORMATS}
    held = [kind.FORMAT for kind in PACKED if kind.FORMAT is not None]
    assert len(held) == len(set(held))
    with pytest.raises(ValueError, match="format: got 'int5', which no packed module holds"):
        packed_class("int5")


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.__name__)
def test_what_is_stored_is_made_again(kind: type) -> None:
    layer = kind.from_format(nn.Linear(64, 32, dtype=torch.bfloat16), FORMATS[kind])
    assert is_packed(layer)
    assert layer.format == FORMATS[kind]
    again = rebuild_packed(*describe_packed(layer), layer.bias)
    assert type(again) is kind
    assert again.format == layer.format
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.dequantize(), layer.dequantize())


def test_what_no_driver_makes_is_not_stored() -> None:
    linear = nn.Linear(8, 4)
    linear.weight.data[:, ::2] = 0
    with pytest.raises(ValueError, match="layer: got Sparse24Linear, expected one that a driver"):
        describe_packed(Sparse24Linear.from_linear(linear))


def test_a_class_of_another_version_is_named() -> None:
    with pytest.raises(ValueError, match="class: got 'FloatLinear', expected one of IntLinear, "):
        rebuild_packed({"class": "FloatLinear", "dtype": "torch.float32"}, {}, None)
