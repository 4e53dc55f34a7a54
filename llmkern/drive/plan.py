"""Which layers of the decoder blocks a driver changes, what each of them gets, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from llmkern._dtypes import FLOATS, overflow_hint
from llmkern.models import block_linears, find_blocks
from llmkern.models.linears import shape_of
from llmkern.patch import choose_linears, refuse_nothing, unmatched, warn_dense, winning_pattern

_T = TypeVar("_T")


def plan_layers(
    model: nn.Module,
    rules: Mapping[str, _T | None],
    *,
    what: str,
    check: Callable[[Mapping[str, tuple[tuple[int, int], Any]]], None],
    fitted: Callable[[_T, int, int], _T | str] | None = None,
    values: bool = True,
) -> tuple[dict[str, _T], dict[str, str]]:
    """What each linear inside the decoder blocks gets, and why each other linear gets nothing.

    Args:
        model: a causal language model.
        rules: glob over full layer names -> what the layer gets, or None to leave it as it is; "*"
            first, for all; the last pattern that matches decides.
        what: the driver's name, for messages: "quantize".
        check: called with the (N, K) of each layer and what it is to get, by name; raises ValueError
            where that does not fit.
        fitted: what a layer that "*" decides about gets, from what "*" says and its N and K, or why it
            gets nothing; None: what "*" says.
        values: look at the weights' values; False for a model without data, of which only the shapes
            count.

    Returns:
        What each layer gets, in the order of definition, and why the others get nothing.

    Raises:
        ValueError: no linear in the blocks that would be changed (it says why), a pattern that
            matches none of them, whatever `check` raises, a weight without data, of another dtype, or
            with NaN or Inf (named).

    Warns:
        UserWarning: matrices that the rules ask for and that no linear holds (experts).
    """
    blocks = find_blocks(model)
    inside = {
        f"{prefix}.{name}": linear
        for prefix, block in blocks.items()
        for name, linear in block_linears(block).items()
    }
    for pattern in unmatched([p for p in rules if p != "*"], inside) if inside else ():
        raise ValueError(
            f"rules: got {pattern!r}, which matches no linear in {blocks.name}; they are named like "
            f"{next(iter(inside))!r}"
        )
    choice = choose_linears(model, rules, lambda wanted, shape: None)
    left, unexpected = dict(choice.left), [*choice.unexpected]
    twice = _used_twice(inside)
    asked: dict[str, tuple[tuple[int, int], _T]] = {}
    for name, wanted in choice.replaced.items():
        got: _T | str = wanted
        if name not in inside:
            left[name] = f"outside the decoder blocks ({blocks.name})"
            continue
        shape = shape_of(inside[name])
        if name in twice:
            got = f"the same module as {twice[name]}"
        elif fitted is not None and winning_pattern(rules, name) == "*":
            got = fitted(wanted, *shape)
        if isinstance(got, str):
            left[name] = got
            unexpected.append(name)
        else:
            asked[name] = (shape, got)
    refuse_nothing("model", asked, left, what)
    check(asked)
    if values:
        for name in asked:
            check_values(name, inside[name])
    warn_dense(what, {name: left[name] for name in unexpected})
    return {name: wanted for name, (_, wanted) in asked.items()}, left


def _used_twice(linears: Mapping[str, nn.Module]) -> dict[str, str]:
    """Another name of each linear that has several: what one of its uses tells is wrong for the other."""
    names: dict[int, list[str]] = {}
    for name, linear in linears.items():
        names.setdefault(id(linear), []).append(name)
    return {
        name: found[1] if name == found[0] else found[0]
        for found in names.values()
        if len(found) > 1
        for name in found
    }


def plan_modules(
    names: list[str], rules: Mapping[str, Any], what: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """`plan_layers` for a list of module names."""
    if not names:
        raise ValueError(f"model: got no {what} in it, expected some")
    for pattern in unmatched([p for p in rules if p != "*"], names):
        raise ValueError(f"rules: got {pattern!r}, which matches no {what}")
    plan, left = {}, {}
    for name in names:
        winner = winning_pattern(rules, name)
        wanted = None if winner is None else rules[winner]
        if wanted is None:
            left[name] = "left as it is by the rules"
        else:
            plan[name] = wanted
    refuse_nothing("rules", plan, left, "change")
    return plan, left


def check_values(name: str, linear: nn.Module) -> None:
    """Refuse a linear whose weight a method cannot work on.

    Raises:
        ValueError: the weight has no data, is of another dtype than float32, bfloat16 or float16, or
            holds NaN or Inf; names the layer.
    """
    weight = linear.get_parameter("weight")
    if weight.is_meta or weight.dtype not in FLOATS:
        kind = "a weight without data" if weight.is_meta else f"a {weight.dtype} weight"
        raise ValueError(f"{name}: got {kind}, expected float32, bfloat16 or float16")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(
            f"{name}: its weight holds NaN or Inf, expected finite numbers{overflow_hint(weight.dtype)}"
        )
