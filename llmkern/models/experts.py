"""Experts that hold their matrices in another way than linears do."""

from __future__ import annotations

from torch import nn

from llmkern.models.linears import is_linear


def find_expert_matrices(model: nn.Module) -> dict[str, str]:
    """Modules that hold matrices of experts in parameters of their own, and how these look.

    transformers keeps MoE experts stacked in one 3-D parameter, or (DBRX) one below the other in a 2-D
    one. Convolutions have 3-D weights too, and embeddings of positions a first dimension of 1: neither is
    listed.
    """
    found = {}
    for name, module in model.named_modules():
        if is_linear(module) or isinstance(module, nn.Embedding | nn.modules.conv._ConvNd):
            continue
        own = list(module.named_parameters(recurse=False))
        stacks = [(n, p) for n, p in own if p.dim() == 3 and p.shape[0] > 1]
        if not stacks and "expert" in f"{name}.{type(module).__name__}".lower():
            stacks = [(n, p) for n, p in own if p.dim() == 2 and min(p.shape) > 1]
        if stacks:
            shapes = ", ".join(f"{n} {list(p.shape)}" for n, p in stacks)
            found[name] = f"its matrices are held in {stacks[0][1].dim()}-D parameters ({shapes})"
    return found
