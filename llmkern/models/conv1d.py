"""Linears that have taken the place of transformers' `Conv1D`, whose weights files hold transposed."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from llmkern.models.linears import bias_of, is_conv1d, shape_of, weight_rows
from llmkern.models.resize import empty_like


def conv1d_places(model: nn.Module) -> dict[str, type[nn.Module]]:
    """Names of nn.Linears, packed ones too, where the class of the model builds a Conv1D, and which."""
    module = sys.modules.get(type(model).__module__)
    if not hasattr(module, "Conv1D") or not hasattr(model, "config"):
        return {}
    found = {}
    for name, built in empty_like(model).named_modules():
        if is_conv1d(built) and isinstance(model.get_submodule(name), nn.Linear):
            found[name] = type(built)
    return found


def as_conv1d(linear: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A Conv1D of the weight and bias of a dense linear, which it shares."""
    with torch.device("meta"):
        made: Any = kind(*shape_of(linear))
    weight = linear.get_parameter("weight")
    made.weight = nn.Parameter(weight_rows(linear).t(), weight.requires_grad)
    made.bias = linear._parameters.get("bias")
    if bias_of(linear) is None:
        made.bias = nn.Parameter(torch.zeros(made.nf).to(weight), False)
    return made.train(linear.training)  # type: ignore[no-any-return]
