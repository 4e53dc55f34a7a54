"""From hidden states to logits: by a matrix where a model's head is one, else by the model itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Beyond any cap: half of float16's range, so that a scale of 2 stays in it.
_LARGE = 3e4


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

    def predicting(self, keep: Tensor | None = None, vocabulary: int | None = None) -> Outputs:
        """The rows [n, D] or [n, V] that predict a next token, states and maps left out.

        Args:
            keep: bool [B, T - 1]: which of them; None for all.
            vocabulary: the first tokens, which alone are predicted; None for all.
        """

        def rows(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            return tensor[:, :-1].flatten(0, 1) if keep is None else tensor[:, :-1][keep]

        head = self.head if self.head is None or vocabulary is None else self.head[:vocabulary]
        logits = self.logits if self.logits is None else self.logits[..., :vocabulary]
        return Outputs(rows(self.hidden), head, rows(logits), (), ())

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


class Reader:
    """Runs a causal language model, and takes what enters its head in place of the logits if it can.

    It can where the head is a matrix and the model hands the product on as it is: no bias, no cap, no
    scale. Every pass looks at that again, by what the model makes of logits from one end of the range to
    the other: a cap hardly shows in small ones, and a scale may be 1 until it is trained. Whatever comes
    before the head is part of what is taken.
    """

    def __init__(self) -> None:
        self._plain = True

    def __call__(
        self, model: Any, batch: dict[str, Tensor], states: bool = False, maps: bool = False
    ) -> Outputs:
        """One forward pass.

        Args:
            model: from transformers, always the same.
            batch: input_ids, and attention_mask where there is one.
            states, maps: return the hidden states after each block, the attention maps.
        """
        options = {"use_cache": False, "output_hidden_states": states, "output_attentions": maps}
        inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
        head = _matrix_head(model) if self._plain else None
        if head is not None:
            tap = _Tap()
            with tap.between(head):
                out = model(**inputs, **options)
            if tap.passed_on(out.logits, inputs["input_ids"].shape):
                assert tap.hidden is not None
                # Under autocast the hidden states are narrower than the weights.
                return Outputs(
                    tap.hidden, head.weight.to(tap.hidden.dtype), None, *_inside(out, states, maps)
                )
        self._plain = False
        out = model(**inputs, **options)
        return Outputs(None, None, out.logits, *_inside(out, states, maps))


def _inside(out: Any, states: bool, maps: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return tuple(out.hidden_states[1:]) if states else (), tuple(out.attentions) if maps else ()


def _matrix_head(model: Any) -> nn.Linear | None:
    """The head, if its own forward is hidden @ weightᵀ and nothing else."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or head.weight.is_meta:
        return None
    changed = head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head)
    return None if changed else head


class _Tap:
    """Takes what enters a head, and puts a row of its own in the place of what leaves it.

    Attributes:
        hidden: [B, T, D], or None where the head was not called with a tensor, or not once.
    """

    def __init__(self) -> None:
        self.hidden: Tensor | None = None
        self._calls = 0
        self._row: Tensor | None = None

    @contextmanager
    def between(self, head: nn.Linear) -> Iterator[None]:
        """While the model runs."""

        def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            self._calls += 1
            self.hidden = args[0] if self._calls == 1 and args else None
            # The head has next to nothing to do: its product is thrown away.
            return tuple(x[..., -1:, :] for x in args)

        def leave(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            row = torch.linspace(-_LARGE, _LARGE, output.shape[-1], device=output.device)
            self._row = row.to(output.dtype).expand(output.shape).clone()
            return self._row

        handles = [head.register_forward_pre_hook(enter), head.register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def passed_on(self, logits: Tensor, shape: torch.Size) -> bool:
        """Whether the model returned the row as it was, or in a wider dtype, after one call."""
        row, hidden = self._row, self.hidden
        if row is None or hidden is None or hidden.shape[:-1] != shape:
            return False
        if logits is row:
            return not row._version
        wider = logits.dtype != row.dtype and logits.shape == row.shape
        return wider and torch.equal(logits, row.to(logits.dtype))
