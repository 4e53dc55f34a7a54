"""Models of fewer blocks: the config that says so, and whether the class then computes the same.

Entries of the config with one value per block follow the blocks, and so do lists of their numbers and
counts from either end. What a class computes from a block's number or from the depth cannot follow: it
is found by comparing the constants of its modules and, where there is data, the logits of the shorter
model with those of the whole one without these blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmkern.models.blocks import evaluation_mode, find_blocks, text_config
from llmkern.models.calls import same_values, skipped
from llmkern.models.reload import can_reload, logits, reloaded
from llmkern.models.resize import (
    ENTRY,
    adopt_settings,
    changed_config,
    other_setting,
    shapes_in,
    share_config,
    skeleton,
)

# Entries that count blocks from the front, and from the back.
_FROM_FRONT = (
    "first_k_dense_replace",
    "max_window_layers",
    "num_dense_layers",
    "moe_layer_start_index",
)
_FROM_BACK = ("num_kv_shared_layers",)
# Words in the names of lists that hold numbers of blocks.
_LISTS = ("layer", "idx", "indices", "blocks")


@dataclass(frozen=True)
class _Shorter:
    """A model of fewer blocks.

    Attributes:
        overrides: what its text config says otherwise.
        config: the whole one.
        built: what the class makes of it, without data.
    """

    overrides: dict[str, Any]
    config: Any
    built: nn.Module


def keep_blocks(model: nn.Module, kept: Sequence[int]) -> None:
    """Leave only the decoder blocks `kept`, in that order, and number them anew.

    Raises:
        ValueError: no block would be left, or the model class cannot be built that way or would compute
            something else (named); the model is then as it was.
    """
    shorter = _planned(model, kept)
    blocks = find_blocks(model).modules
    for index in reversed(range(len(blocks))):
        if index not in kept:
            del blocks[index]
    adopt_settings(blocks, find_blocks(shorter.built).modules)
    for name, value in shorter.overrides.items():
        setattr(text_config(model), name, value)
    widths = getattr(shorter.config, ENTRY, None)
    if widths:
        setattr(model.config, ENTRY, widths)
    share_config(model, {int(i) for i in (widths or {}).get("layers", {})})


def check_depth(model: nn.Module, kept: Sequence[int]) -> None:
    """Refuse what `keep_blocks` will refuse; nothing is changed."""
    _planned(model, kept)


def _planned(model: nn.Module, kept: Sequence[int]) -> _Shorter:
    blocks = find_blocks(model)
    if not kept:
        raise ValueError(f"kept: got no block of the {len(blocks)}, expected at least one")
    overrides = _depth_overrides(text_config(model), kept, len(blocks))
    try:
        config = changed_config(model.config, overrides)
        widths = (getattr(config, ENTRY, None) or {}).get("layers", {})
        if widths:
            layers = {str(i): widths[str(old)] for i, old in enumerate(kept) if str(old) in widths}
            setattr(config, ENTRY, {"layers": layers})
        built = skeleton(model, config)
        _check_shapes(model, built, kept)
        own = nn.ModuleList(blocks.modules[old] for old in kept)
        odd = other_setting(own, find_blocks(built).modules, sizes=True)
        if odd is not None:
            raise ValueError(f"{type(model).__name__} goes by a block's number or the depth: {odd}")
        _check_function(model, config, built, kept)
    except ValueError as error:
        raise ValueError(
            f"model: got blocks {list(kept)} to be left of {len(blocks)}, expected some that "
            f"{type(model).__name__} can do with: {error}"
        ) from error
    return _Shorter(overrides, config, built)


def _depth_overrides(text: Any, kept: Sequence[int], depth: int) -> dict[str, Any]:
    overrides: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for name, value in text.to_dict().items():
        if isinstance(value, list) and "token" not in name:
            # Lists of tokens may happen to be as long as the model is deep.
            if len(value) == depth:
                overrides[name] = [value[index] for index in kept]
            elif _are_numbers(name, value, depth):
                overrides[name] = [i for i, old in enumerate(kept) if old in value]
        elif name in _FROM_FRONT and isinstance(value, int):
            overrides[name] = sum(old < value for old in kept)
        elif name in _FROM_BACK and isinstance(value, int):
            overrides[name] = sum(old >= depth - value for old in kept)
    return {n: v for n, v in overrides.items() if v != getattr(text, n, None)}


def _are_numbers(name: str, value: list[Any], depth: int) -> bool:
    """Whether a list of the config holds numbers of blocks."""
    return any(word in name for word in _LISTS) and all(
        type(number) is int and 0 <= number < depth for number in value
    )


def _check_shapes(model: nn.Module, built: nn.Module, kept: Sequence[int]) -> None:
    prefix = find_blocks(model).name
    wanted = {n: s for n, s in shapes_in(model) if not n.startswith(f"{prefix}.")}
    for index, old in enumerate(kept):
        block = find_blocks(model).modules[old]
        wanted |= {f"{prefix}.{index}.{name}": shape for name, shape in shapes_in(block)}
    got = dict(shapes_in(built))
    odd = next((n for n in (*wanted, *got) if got.get(n) != wanted.get(n)), None)
    if odd is not None:
        raise ValueError(f"{odd} would be {got.get(odd)}, not {wanted.get(odd)}")


def _check_function(model: nn.Module, config: Any, built: nn.Module, kept: Sequence[int]) -> None:
    """Compare with the whole model, whose other blocks hand on what they are given."""
    blocks = find_blocks(model)
    numbers = {str(old): str(index) for index, old in enumerate(kept)}

    def rename(name: str) -> str | None:
        if not name.startswith(f"{blocks.name}."):
            return name
        number, _, rest = name.removeprefix(f"{blocks.name}.").partition(".")
        return f"{blocks.name}.{numbers[number]}.{rest}" if number in numbers else None

    with torch.no_grad(), evaluation_mode(model), ExitStack() as stack:
        if not can_reload(model):
            _check_runs(model, built)
            return
        made = reloaded(model, config, rename)
        for index, block in enumerate(blocks.modules):
            if index not in kept:
                stack.enter_context(skipped(block))
        try:
            same = same_values(logits(made), logits(model, use_cache=False))
        except Exception as error:  # model classes raise what they like
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"it does not run without the others: {reason}") from error
    if not same:
        raise ValueError("its logits are not those of the whole model without the others")


def _check_runs(model: nn.Module, built: nn.Module) -> None:
    """Without data: whether it runs, where the whole model does."""
    tokens = torch.zeros(1, 8, dtype=torch.int64, device=next(model.parameters()).device)
    why = None
    with suppress(Exception):  # not every model runs without data
        model(input_ids=tokens)
        try:
            built.eval()(input_ids=tokens)
        except ValueError as error:
            why = " ".join(str(error).split())
    if why is not None:
        raise ValueError(f"it does not run without the others: {why}")
