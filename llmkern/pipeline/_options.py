"""Options of a stage, checked against the annotations of the driver that will get them."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

# How a person calls what an option holds.
_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    Path: "a path",
    type(None): "null",
}


def driver_options(driver: Callable[..., Any], without: Collection[str]) -> dict[str, Any]:
    """Annotations of a function's keyword-only parameters, by name, but for those in `without`."""
    hints = typing.get_type_hints(driver)
    parameters = inspect.signature(driver).parameters.values()
    named = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return {name: hints[name] for name in named if name not in without}


def class_options(kind: type, without: Collection[str] = ()) -> dict[str, Any]:
    """Annotations of a dataclass's fields, by name, but for those in `without`."""
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    return {name: hints[name] for name in names if name not in without}


def check_names(options: Iterable[str], known: Collection[str]) -> None:
    """Refuse an option that is not among the known ones.

    Raises:
        ValueError: names the option, and the known one that is spelled most like it.
    """
    for name in options:
        if name not in known:
            raise ValueError(f"{name}: unknown, {nearest(name, known)}")


def nearest(name: str, known: Collection[str]) -> str:
    """The end of a message about an unknown name."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"expected one of {', '.join(sorted(known))}"


def plain(name: str, value: Any, hint: Any) -> Any:
    """`value` as the annotation has it, in the types that YAML and JSON know.

    Numbers that YAML reads as text (1e-3), whole numbers written as decimals and tuples are what they
    plainly mean.

    Args:
        name: of the option, for messages.
        value: as given.
        hint: annotation of a parameter or field.

    Raises:
        ValueError: the annotation does not allow it.
    """
    found = _either(value, hint)
    if found is not NotImplemented:
        return found
    words = list(dict.fromkeys(_words(kind) for kind in _alternatives(hint)))
    raise ValueError(f"{name}: got {value!r}, expected {' or '.join(words)}")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (Union, types.UnionType):
        return tuple(kind for part in typing.get_args(hint) for kind in _alternatives(part))
    return (hint,)


def _same(value: Any, kind: Any) -> Any:
    """`value`, if it is of the kind without doubt."""
    origin = typing.get_origin(kind)
    if kind is Any:
        return value
    if origin is Literal:
        return value if value in typing.get_args(kind) else NotImplemented
    if kind is float and type(value) is float:
        return value if math.isfinite(value) else NotImplemented
    if kind in (bool, int, str, type(None)) and type(value) is kind:
        return value
    if origin is not None and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return dict(value)
    if _is_row(origin) and isinstance(value, list | tuple):
        # The length of a tuple is the driver's to check, as is what its numbers mean.
        part = typing.get_args(kind)[0]
        items = [_either(item, part) for item in value]
        return NotImplemented if any(item is NotImplemented for item in items) else items
    return NotImplemented


def _meant(value: Any, kind: Any) -> Any:
    """`value` in the kind that it was plainly meant to have."""
    if kind in (str, Path) and isinstance(value, str | Path):
        return str(value)
    if kind not in (int, float) or isinstance(value, bool):
        return NotImplemented
    try:
        number = float(value)
    except (TypeError, ValueError):
        return NotImplemented
    if not math.isfinite(number) or (kind is int and number != int(number)):
        return NotImplemented
    return kind(number)


def _either(value: Any, hint: Any) -> Any:
    for convert in (_same, _meant):
        for kind in _alternatives(hint):
            found = convert(value, kind)
            if found is not NotImplemented:
                return found
    return NotImplemented


def _is_row(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, Sequence)


def _words(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin is Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    if origin is not None and issubclass(origin, Mapping):
        return "a mapping"
    if _is_row(origin):
        return "a list"
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))
