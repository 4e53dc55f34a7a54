"""Linears that stand where transformers' `Conv1D` was, whose weight files hold the other way round.

A packed Conv1D that is expanded, or written to, is an nn.Linear of the same function.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llmkern.models.linears import is_conv1d, shape_of, weight_rows
from llmkern.models.resize import empty_like


@contextmanager
def as_built(model: nn.Module) -> Iterator[None]:
    """Conv1D in the place of such linears, and the linears themselves afterwards."""
    held = restore_conv1d(model)
    try:
        yield
    finally:
        for name, linear in held.items():
            model.set_submodule(name, linear)


def restore_conv1d(model: nn.Module) -> dict[str, nn.Module]:
    """Make a Conv1D of every dense nn.Linear that stands where the model's class has one, in place.

    Returns:
        What was there, by full name.
    """
    kind: Any = getattr(sys.modules.get(type(model).__module__), "Conv1D", None)
    if kind is None:
        return {}
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for name, built in empty_like(model).named_modules():
        linear = modules.get(name)
        if is_conv1d(built) and type(linear) is nn.Linear:
            model.set_submodule(name, _conv1d(linear, kind))
            found[name] = linear
    return found


def _conv1d(linear: nn.Linear, kind: Any) -> nn.Module:
    with torch.device("meta"):
        conv = kind(*shape_of(linear))
    conv.weight = nn.Parameter(weight_rows(linear).t().contiguous(), linear.weight.requires_grad)
    conv.bias = linear.bias
    return conv.train(linear.training)  # type: ignore[no-any-return]
