"""What lies around the decoder blocks, and what is shared: heads, routers, embeddings, tied weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from llmkern.models.experts import expert_counts, find_expert_matrices
from llmkern.models.linears import find_linears, shape_of

# Last components of the names of layers that decide which expert or class wins: tiny, and sensitive.
_HEADS = ("lm_head", "embed_out", "output_layer", "score", "classifier")
_ROUTERS = ("gate", "router", "shared_expert_gate", "gating", "wg", "gate_network")
# Narrower linears route or scale; as packed layers they would save nothing.
_SMALLEST = 16


def is_head(name: str) -> bool:
    """Whether a linear of this full name gives logits."""
    return name.rpartition(".")[2] in _HEADS


def is_router(name: str) -> bool:
    """Whether a linear of this full name chooses the experts of a token: `gate`, `router.layer`."""
    return any(part in _ROUTERS for part in name.split(".")[-2:])


def find_routers(model: nn.Module) -> dict[str, str]:
    """Linears that choose or scale, by full name, and what they are.

    By name; by place, an output per expert beside the experts; and any that is narrower than 16.
    """
    linears, found = find_linears(model), {}
    placed = _routers_by_place(model, linears)
    for name, linear in linears.items():
        N, K = shape_of(linear)
        if name in placed or (is_router(name) and not _is_half_of_a_glu(name, linears)):
            found[name] = "a router"
        elif min(N, K) < _SMALLEST:
            found[name] = f"only {N} x {K}"
    return found


def _is_half_of_a_glu(name: str, linears: dict[str, nn.Module]) -> bool:
    """Whether another linear beside it has its shape, as `up` beside a `gate` of neurons."""
    parent, shape = name.rpartition(".")[0], shape_of(linears[name])
    return shape[0] >= _SMALLEST and any(
        other != name and other.rpartition(".")[0] == parent and shape_of(linear) == shape
        for other, linear in linears.items()
    )


def _routers_by_place(model: nn.Module, linears: dict[str, nn.Module]) -> set[str]:
    """Linears with an out feature for each expert, in the module around these, or alone in a part."""
    counts = expert_counts(model)
    if not counts:
        return set()
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.ModuleDict)}
    stacks = set(find_expert_matrices(model))
    for name, modules in lists.items():
        in_block = any(name.startswith(f"{other}.") for other in lists)
        if in_block and len(modules) in counts:
            stacks.add(name)
    around = {name.rpartition(".")[0] for name in stacks}
    # A module of nothing but them counts as one of them (DBRX: ffn.experts.mlp).
    around |= {name.rpartition(".")[0] for name in around if _has_one_part(model, name)}
    around.discard("")
    found = set()
    for name, linear in linears.items():
        inside = any(name.startswith(f"{stack}.") for stack in stacks)
        if shape_of(linear)[0] not in counts or inside:
            continue
        parent = name.rpartition(".")[0]
        alone = _has_one_part(model, parent)
        if parent in around or (alone and parent.rpartition(".")[0] in around):
            found.add(name)
    return found


def _has_one_part(model: nn.Module, name: str) -> bool:
    return len(list(model.get_submodule(name).children())) == 1


def tied_embedding(model: Any) -> nn.Parameter | None:
    """The matrix that both embeds the tokens of a transformers model and gives its logits, or None."""
    inner, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is not inner.weight:
        return None
    weight: nn.Parameter = head.weight
    return weight


def shared_weights(model: nn.Module) -> dict[int, list[str]]:
    """Names under which each weight parameter is reached by different modules, where there are two."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            users.setdefault(id(weight), []).append(name)
    return {key: names for key, names in users.items() if len(names) > 1}
