"""What blocks leave to later ones beside hidden states: shared dicts and lists, second outputs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, MutableMapping, MutableSequence
from typing import Any

from torch import Tensor


def entries_of(value: Any) -> list[Any] | None:
    """What a dict or list holds; None for anything else."""
    if isinstance(value, MutableMapping):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, MutableSequence) else None


def same_entries(a: list[Any] | None, b: list[Any] | None) -> bool:
    if a is None or b is None:
        return a is b
    return len(a) == len(b) and all(
        x is y or (isinstance(x, (str, int)) and x == y) for x, y in zip(a, b, strict=True)
    )


def copied(value: Any) -> Any:
    """A dict or list of its own with the same tensors in it."""
    return copy.copy(value) if entries_of(value) is not None else value


def tensors_in(value: Any, name: str) -> Iterator[tuple[tuple[str | int, ...], Tensor]]:
    """The tensors of what a block has left, each with the way to it.

    Raises:
        ValueError: it is something else than a tensor, a tuple of them, or a dict or list of these.
    """
    entries = entries_of(value)
    pairs: Any = [((), value)]
    if isinstance(value, MutableMapping):
        pairs = [((key,), entry) for key, entry in value.items()]
    elif entries is not None:
        pairs = [((index,), entry) for index, entry in enumerate(entries)]
    for path, entry in pairs:
        within = entry if isinstance(entry, tuple) else (entry,)
        if not all(isinstance(t, Tensor) for t in within):
            raise ValueError(
                f"checkpoint: got blocks that leave {type(entry).__name__} in {name}, expected tensors "
                "or tuples of them: nothing else can be kept; without a checkpoint it works"
            )
        for index, tensor in enumerate(within):
            yield (*path, index) if isinstance(entry, tuple) else path, tensor


def refilled(value: Any, tree: dict[Any, Any]) -> Any:
    """What `tensors_in` found the tensors of, from a tree of them."""
    entries = {k: _in_order(v) if isinstance(v, dict) else v for k, v in tree.items()}
    if isinstance(value, MutableMapping):
        value.update(entries)
        return value
    if isinstance(value, MutableSequence):
        value[:] = _in_order(entries)
        return value
    return entries[None] if None in entries else _in_order(entries)


def _in_order(entries: dict[int, Any]) -> tuple[Any, ...]:
    return tuple(entries[index] for index in sorted(entries))
