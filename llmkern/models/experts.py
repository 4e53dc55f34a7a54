"""Experts that hold their matrices in another way than linears do."""

from __future__ import annotations

from torch import nn


def find_expert_matrices(model: nn.Module) -> dict[str, str]:
    """Modules that hold a stack of matrices in one 3-D parameter, and how it looks.

    transformers keeps MoE experts this way; convolutions have such weights too and are not listed.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            continue
        stacks = [
            f"{n} {list(p.shape)}"
            for n, p in module.named_parameters(recurse=False)
            if p.dim() == 3
        ]
        if stacks:
            found[name] = f"its matrices are held in 3-D parameters ({', '.join(stacks)})"
    return found
