"""Calls of a model's blocks: their hidden states, and other forwards in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# What another order of sums may do to a block's output, as a multiple of the dtype's rounding error.
_ROUNDING = 4


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a block, but for the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str | None  # name under which the hidden states are passed; None: first positional


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, Tensor]:
    """Take the hidden states out of a block's arguments: those of that name, or the first tensor."""
    if args and isinstance(args[0], Tensor):
        return Call(args[1:], kwargs, None), args[0]
    for keyword in ("hidden_states", *kwargs):
        value = kwargs.get(keyword)
        if isinstance(value, Tensor):
            rest = {k: v for k, v in kwargs.items() if k != keyword}
            return Call(args, rest, keyword), value
    raise ValueError(
        "model: got decoder blocks that are called without a tensor, expected hidden states"
    )


def hidden_of(output: Any) -> Tensor:
    out = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(out, Tensor):
        raise ValueError(
            f"model: got decoder blocks that return {type(out).__name__}, expected hidden states"
        )
    return out


def returned_like(output: Any, extras: Sequence[Any]) -> Callable[[Tensor], Any]:
    """How to return hidden states the way `output` was returned, `extras` in place of the others."""
    if isinstance(output, Tensor):
        return lambda x: x
    kind, rest = type(output), tuple(extras)[1:]
    return lambda x: kind((x, *rest))


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    # Libraries that place models on devices keep a forward of their own in the instance.
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


@contextmanager
def skipped(block: nn.Module) -> Iterator[None]:
    """Let a decoder block hand on the hidden states that it is given, as if it were not there."""
    wrap: list[Callable[[Tensor], Any]] = []
    original = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = split_call(args, kwargs)[1]
        if not wrap:  # once: does this model's block return a tensor or a tuple?
            kept = x.clone()
            output = original(*args, **kwargs)
            wrap.append(returned_like(output, output))
            x = kept
        return wrap[0](x)

    with forward_replaced(block, forward):
        yield


def same_values(a: Tensor, b: Tensor) -> bool:
    """Equal up to another order of sums; what is not finite in one is not in the other."""
    if a.shape != b.shape:
        return False
    if torch.equal(a, b):
        return True
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite) or not bool(finite.any()):
        return torch.equal(a.isfinite(), finite)
    error, size = (a - b)[finite].abs().max(), b[finite].abs().max()
    return bool(error <= _ROUNDING * torch.finfo(b.dtype).eps * size)
