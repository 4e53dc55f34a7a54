"""Putting one layer in the place of another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

Replacement = TypeVar("Replacement", bound=nn.Module)

# Attributes in which a module keeps what has been registered on it.
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)


def like(module: nn.Module, layer: Replacement) -> Replacement:
    """`layer` in the mode and with the hooks of the module that it replaces.

    The tables of hooks themselves go over, so that handles still remove what they have registered.
    """
    layer.train(module.training)
    for name in _HOOKS:
        if vars(module).get(name):
            vars(layer)[name] = vars(module)[name]
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        # A model spread over devices moves activations between them in these hooks.
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(layer, hook)
    return layer


def replace_modules(model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> None:
    """Put each new module in the place of the old one, under all of its names."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in made:
            model.set_submodule(name, made[module])
