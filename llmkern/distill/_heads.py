"""From hidden states to logits: by a matrix where a model's head is one, else by the model itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Outputs(NamedTuple):
    """What a forward pass gave: hidden states before a plain head, or logits where it is not plain.

    Attributes:
        hidden, head: [B, T, D] and [V, D], or None.
        logits: [B, T, V], or None.
        states: hidden states after each block, if asked for.
        attentions: attention maps of each block, if asked for.
    """

    hidden: Tensor | None
    head: Tensor | None
    logits: Tensor | None
    states: tuple[Tensor, ...]
    attentions: tuple[Tensor, ...]

    def predicting(self, keep: Tensor | None = None) -> Outputs:
        """The rows [n, D] or [n, V] that predict a next token, states and maps left out.

        Args:
            keep: bool [B, T - 1]: which of them; None for all.
        """

        def rows(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            return tensor[:, :-1].flatten(0, 1) if keep is None else tensor[:, :-1][keep]

        return Outputs(rows(self.hidden), self.head, rows(self.logits), (), ())

    def to(self, device: torch.device) -> Outputs:
        """The same on another device."""

        def move(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(v.to(device) for v in value)
            return None if value is None else value.to(device)

        return Outputs(*(move(value) for value in self))

    def all_logits(self) -> Tensor:
        """Logits [..., V]."""
        if self.logits is not None:
            return self.logits
        assert self.hidden is not None
        assert self.head is not None
        return self.hidden @ self.head.t()


def run(
    model: Any, batch: dict[str, Tensor], plain: bool, states: bool = False, maps: bool = False
) -> Outputs:
    """One forward pass of a causal language model.

    Args:
        model: from transformers.
        batch: input_ids, and attention_mask where there is one.
        plain: see `has_plain_head`.
        states, maps: return the hidden states after each block, the attention maps.
    """
    options = {"use_cache": False, "output_hidden_states": states, "output_attentions": maps}
    inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    out = (model.base_model if plain else model)(**inputs, **options)
    extra = (tuple(out.hidden_states[1:]) if states else (), tuple(out.attentions) if maps else ())
    if not plain:
        return Outputs(None, None, out.logits, *extra)
    hidden = out.last_hidden_state
    # Under autocast the hidden states are narrower than the weights.
    head = model.get_output_embeddings().weight.to(hidden.dtype)
    return Outputs(hidden, head, None, *extra)


def has_plain_head(model: Any, tokens: Tensor) -> bool:
    """Whether the logits are hidden @ headᵀ and nothing else (no bias, no cap, no scale), tried out.

    Args:
        model: from transformers.
        tokens: int64 [B, T], a few of them.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or model.base_model is model:
        return False
    with torch.no_grad():
        want = model(input_ids=tokens, use_cache=False).logits
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        got = head(hidden)
    return got.shape == want.shape and torch.allclose(
        got.float(), want.float(), rtol=1e-3, atol=1e-3
    )
