"""What lies around the decoder blocks, and what is shared: heads, routers, embeddings, tied weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from llmkern.models.linears import find_linears, shape_of

# Last components of the names of layers that decide which expert or class wins: tiny, and sensitive.
_HEADS = ("lm_head", "embed_out", "output_layer", "score", "classifier")
_ROUTERS = ("gate", "router", "shared_expert_gate", "gating", "wg", "gate_network")
# What configs call the number of experts.
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
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

    By name; by shape, an output per expert beside a module of experts; and any that is narrower than 16.
    """
    counts = _expert_counts(getattr(model, "config", None))
    beside = {
        name.rpartition(".")[0]
        for name, _ in model.named_modules()
        if "expert" in name.rpartition(".")[2]
    }
    found = {}
    for name, linear in find_linears(model).items():
        N, K = shape_of(linear)
        if is_router(name) or (N in counts and name.rpartition(".")[0] in beside):
            found[name] = "a router"
        elif min(N, K) < _SMALLEST:
            found[name] = f"only {N} x {K}"
    return found


def _expert_counts(config: Any) -> set[int]:
    """The numbers of experts in a config and the ones nested in it."""
    nested = (
        [v for v in vars(config).values() if hasattr(v, "to_dict")] if config is not None else []
    )
    own = {getattr(config, key, None) for key in _COUNTS}
    return {n for n in own if isinstance(n, int) and n > 1}.union(*map(_expert_counts, nested))


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
