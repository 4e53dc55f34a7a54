"""Putting one layer in the place of another."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

Replacement = TypeVar("Replacement", bound=nn.Module)


def like(module: nn.Module, layer: Replacement) -> Replacement:
    """`layer` in the mode and with the hooks of the module that it replaces."""
    layer.train(module.training)
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        # A model spread over devices moves activations between them in these hooks.
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(layer, hook)
    return layer
