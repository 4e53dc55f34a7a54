"""Experts that hold their matrices in another way than linears do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from llmkern.models.linears import is_linear

# Names in configs: num_experts, num_local_experts, n_routed_experts, moe_num_experts ...
_COUNT = re.compile(r"(^|_)(n|num)_(\w+_)?experts$")
_NO_COUNT = ("per_tok", "shared", "activated", "selected")


def find_expert_matrices(model: nn.Module) -> dict[str, str]:
    """Modules that hold matrices of experts in parameters of their own, and how these look.

    transformers keeps MoE experts stacked in one 3-D parameter, or (DBRX) one below the other in a 2-D
    one; others keep a list of them. Convolutions have 3-D weights too, and embeddings of positions a
    first dimension of 1: neither is listed.
    """
    found = {}
    for name, module in model.named_modules():
        if is_linear(module) or isinstance(module, nn.Embedding | nn.modules.conv._ConvNd):
            continue
        own = list(module.named_parameters(recurse=False))
        stacks = [(n, p) for n, p in own if p.dim() == 3 and min(p.shape) > 1]
        if not stacks and "expert" in f"{name}.{type(module).__name__}".lower():
            stacks = [(n, p) for n, p in own if p.dim() == 2 and min(p.shape) > 1]
        if not stacks and isinstance(module, nn.ParameterList | nn.ParameterDict) and len(own) > 1:
            stacks = [(n, p) for n, p in own if p.dim() == 2 and min(p.shape) > 1]
        if stacks:
            shapes = ", ".join(f"{n} {list(p.shape)}" for n, p in stacks)
            found[name] = f"its matrices are held in {stacks[0][1].dim()}-D parameters ({shapes})"
    return found


def expert_counts(model: nn.Module) -> set[int]:
    """The numbers of experts that a layer has by the model's config; a few for mixed models."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        entries = config.to_dict()
    else:
        entries = {key: getattr(config, key) for key in dir(config) if key[0] != "_"}
    return {count for count in _counts(entries) if count > 1}


def _counts(entries: Mapping[str, Any]) -> Iterator[int]:
    for key, value in entries.items():
        if isinstance(value, Mapping):
            yield from _counts(value)
            continue
        key = str(key)  # labels are numbered
        counted = _COUNT.search(key) and not any(part in key for part in _NO_COUNT)
        for number in value if isinstance(value, list | tuple) else (value,):
            if counted and type(number) is int:
                yield number
