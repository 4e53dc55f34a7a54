"""What lies around the decoder blocks, and what is shared: heads, routers, embeddings, tied weights."""

from __future__ import annotations

from typing import Any

from torch import nn

# Last components of the names of layers that decide which expert or class wins: tiny, and sensitive.
_HEADS = ("lm_head", "embed_out", "output_layer", "score", "classifier")
_ROUTERS = ("gate", "router", "shared_expert_gate")


def is_head(name: str) -> bool:
    """Whether a linear of this full name gives logits."""
    return name.rpartition(".")[2] in _HEADS


def is_router(name: str) -> bool:
    """Whether a linear of this full name chooses the experts of a token."""
    return name.rpartition(".")[2] in _ROUTERS


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
