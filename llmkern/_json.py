"""JSON that any parser reads: it has no NaN and no infinity, which here are the texts that name them."""

from __future__ import annotations

import json
import math
from typing import Any

# The names that protocol buffers and JavaScript have for them; Python's float() takes them, too.
_NAMES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_json(value: Any, **options: Any) -> str:
    """`json.dumps` of a value in which numbers may be NaN or infinite: they become texts.

    Args:
        value: of dicts, lists, tuples, texts, numbers and None.
        options: of `json.dumps`.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_named(value), allow_nan=False, **options)


def numbers(value: Any) -> Any:
    """A value read from such JSON, its numbers as they were; for what holds figures and no prose."""
    if isinstance(value, dict):
        return {key: numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [numbers(entry) for entry in value]
    return _NAMES.get(value, value) if isinstance(value, str) else value


def _named(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _named(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_named(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
