"""Numbers that JSON does not know, written as texts and read back."""

from __future__ import annotations

import json
import math

import pytest

from llmkern._json import numbers, to_json

VALUE = {"a": [1, math.inf, {"b": -math.inf}], "c": (math.nan, None, True), "d": "text", "e": 0.5}


def test_they_are_texts_that_any_parser_reads() -> None:
    text = to_json(VALUE, indent=1)
    read = json.loads(text, parse_constant=pytest.fail)
    assert read == {
        "a": [1, "Infinity", {"b": "-Infinity"}],
        "c": ["NaN", None, True],
        "d": "text",
        "e": 0.5,
    }
    back = numbers(read)
    assert back["a"] == [1, math.inf, {"b": -math.inf}]
    assert math.isnan(back["c"][0])
    assert {float(entry) for entry in read["a"][:2]} == {1.0, math.inf}


def test_everything_else_is_as_the_library_writes_it() -> None:
    value = {"a": [1, 2.5, None, "Infinity", "ü"], "b": {}}
    assert to_json(value, indent=2, ensure_ascii=False) == json.dumps(
        value, indent=2, ensure_ascii=False
    )
    assert to_json({"path": object}, default=lambda entry: "type") == '{"path": "type"}'
