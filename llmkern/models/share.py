"""How much of a model a compression leaves as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from torch import nn

from llmkern.models.experts import find_expert_matrices
from llmkern.models.heads import is_head
from llmkern.models.linears import is_linear


def left_share(model: nn.Module, done: Collection[str]) -> str:
    """One sentence: the share of the parameters that no layer in `done` holds, and where they are.

    Args:
        model: after the work. Layers that hold codes count as the N * K weights that they stand for.
        done: full names of the layers that were compressed.
    """
    experts = tuple(f"{name}." for name in find_expert_matrices(model))
    left: Counter[str] = Counter()
    total, seen, finished = 0, set(), set(done)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module._parameters.get("weight") is None:  # packed
            total += module.out_features * module.in_features
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            total += parameter.numel()
            if not (name in finished and key == "weight"):
                left[_kind(name, module, key, experts)] += parameter.numel()
    count = sum(left.values())
    parts = ", ".join(f"{kind} {_millions(n)}" for kind, n in left.most_common())
    share = count / max(1, total)
    return f"{_millions(count)} of {_millions(total)} parameters ({share:.1%}) stay as they were: {parts}"


def _kind(name: str, module: nn.Module, key: str, experts: tuple[str, ...]) -> str:
    if f"{name}.".startswith(experts):
        return "experts"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if key != "weight" or not is_linear(module):
        return "norms, biases and others"
    return "head" if is_head(name) else "linears"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 100_000 else f"{count:,}"
