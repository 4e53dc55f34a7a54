"""Packing a model's layers for their kernels before anything looks at them."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from llmkern.nn._packed_linear import is_packed

Model = TypeVar("Model", bound=nn.Module)


def prepare(model: Model) -> Model:
    """Bring every packed layer into the layout of the kernel that serves its device, now.

    Without it, the first forward pass does, layer by layer, and torch.compile while it traces the first
    packed layer, for all that there are then. `llmkern.load` and `llmkern.accelerate` have done it. The
    layout outlives `.to` and `load_state_dict`; what is saved, copied and pickled is the canonical one.

        model = llmkern.prepare(model)
        for block in model.model.layers:
            block.compile()

    Args:
        model: any module; layers on the meta device stay as they are.

    Returns:
        The same model.
    """
    for module in model.modules():
        if is_packed(module):
            module.prepare()
    return model
