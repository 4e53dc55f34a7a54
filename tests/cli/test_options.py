"""Options made from annotations and docstrings, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from llmkern.calibrate.data import Source
from llmkern.cli import _options
from llmkern.cli._docstrings import brief, entries
from llmkern.drive import Method


@dataclass(frozen=True)
class Base:
    """What both have.

    Attributes:
        first, last: blocks that stay; None: one each.
    """

    first: int | None = None
    last: int | None = None


@dataclass(frozen=True)
class A(Base):
    """Options of a; those of `Base`, and

    Attributes:
        damp: fraction of the mean of the diagonal (of the Hessian; see
            `obs`), in [0, 1).
        on: do it.
        limit: largest weight; None for no limit.
        names: of layers.
        where: a file, or the texts.
        either: a number, or "auto".
        unwritable: no command line can hold it.
    """

    damp: float = 0.01
    on: bool | None = None
    limit: float | None = 10.0
    names: tuple[str, ...] | None = None
    where: str | Path | tuple[str, ...] | None = None
    either: int | Literal["auto"] | None = "auto"
    unwritable: dict[str, int] | None = None


@dataclass(frozen=True)
class B(Base):
    """Options of b.

    Attributes:
        damp: see `A`.
        last: the end.
    """

    damp: float = 0.5
    last: int | None = 2


METHODS = [
    Method(name="a", about="the first one", options=A),
    Method(name="b", about="[0, 1) is no markup", options=B),
]


def driver(
    model: Any,
    method: str = "a",
    *,
    calibration: Source = None,
    samples: int = 8,
    **options: Any,
) -> None:
    """Do it.

    Args:
        model: changed.
        method: one of them.
        calibration: text; None takes ours.
        samples: windows.
        options: the method's.

    Returns:
        samples: this is no argument.
    """


def verb() -> _options.Verb:
    panels = {"calibration": "Data", "samples": "Data"}
    return _options.Verb(driver, METHODS, _options.from_function(driver, panels))


def call(*arguments: str) -> tuple[Any, dict[str, Any]]:
    """The exception or None, and what the command got."""
    got: dict[str, Any] = {}

    def command(model: Annotated[str, typer.Argument()], own: int = 3, **options: Any) -> None:
        """Do it."""
        got.update(options, model=model, own=own)

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(_options.with_options(command, verb().options()))
    return CliRunner().invoke(app, ["m", *arguments]), got


def test_only_what_was_written_is_passed() -> None:
    assert call()[1] == {"model": "m", "own": 3}
    assert call("--samples", "8")[1] == {"model": "m", "own": 3, "samples": 8}


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ("--damp 0.25", {"damp": 0.25}),
        ("--on", {"on": True}),
        ("--no-on", {"on": False}),
        ("--limit none", {"limit": None}),
        ("--limit 1e1", {"limit": 10.0}),
        ("--names x --names y,z", {"names": ("x", "y,z")}),
        ("--where x", {"where": Path("x")}),
        ("--either auto", {"either": "auto"}),
        ("--either -1", {"either": -1}),
        ("--first 2", {"first": 2}),
        ("--calibration builtin", {"calibration": "builtin"}),
    ],
)
def test_values_are_those_of_the_annotations(arguments: str, value: dict[str, Any]) -> None:
    result, got = call(*arguments.split())
    assert result.exit_code == 0, result.output
    assert got == {"model": "m", "own": 3, **value}
    assert [type(v) for v in got.values()] == [type(got[name]) for name in got]


@pytest.mark.parametrize("arguments", ["--damp x", "--limit x", "--first 1.5", "--unwritable 1"])
def test_other_values_are_refused(arguments: str) -> None:
    result, got = call(*arguments.split())
    assert result.exit_code == 2
    assert not got


def test_options_are_grouped_by_who_has_them_and_say_whose_default() -> None:
    made = {option.name: option for option in verb().options()}
    assert "unwritable" not in made
    assert made["damp"].panel == made["first"].panel == "All methods"
    assert made["on"].panel == "Method a"
    assert made["samples"].panel == "Data"
    assert made["damp"].default == "0.01; b: 0.5"
    text = "Fraction of the mean of the diagonal (of the Hessian; see obs), in [0, 1)."
    assert made["damp"].help == text
    assert made["last"].default == "b: 2"
    assert made["last"].help == "Blocks that stay; by default one each.\n\nb: the end."
    assert made["method"].help.splitlines() == ["a: the first one", "", "b: [0, 1) is no markup"]
    assert made["method"].default == "a"


def test_an_option_of_another_method_is_refused() -> None:
    given = {"method": "b", "samples": 3, "damp": 0.1}
    assert verb().choose(given).options is B
    assert given == {"samples": 3, "damp": 0.1}
    with pytest.raises(ValueError, match=r"^--on: got False, expected nothing: --method b has no"):
        verb().choose({"method": "b", "on": False})
    with pytest.raises(ValueError, match=r"^method: got 'c', expected one of a, b$"):
        verb().choose({"method": "c"})


def test_docstrings_are_read_entry_by_entry() -> None:
    assert entries(driver.__doc__, "Args")["samples"] == "windows."
    assert entries(Base.__doc__, "Attributes")["first"] == "blocks that stay; None: one each."
    assert entries(driver.__doc__, "Attributes") == entries(None, "Args") == {}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("windows.", "Windows."),
        ("text (see `llmkern.data`); None takes ours.", "Text; by default ours."),
        ("directory; None keeps none.", "Directory."),
        ("weight; None for no limit: all.", "Weight; none for no limit: all."),
        (f"first. {'Long ' * 30}. None: what counts.", "First. By default what counts."),
        ("", ""),
    ],
)
def test_help_is_brief_and_says_what_holds_by_default(text: str, line: str) -> None:
    assert brief(text) == line


def test_sequences_of_any_kind_are_repeatable() -> None:
    @dataclass(frozen=True)
    class Options:
        """Options.

        Attributes:
            prompts: texts.
        """

        prompts: Sequence[str] | None = None

    Options.__annotations__["prompts"] = Sequence[str] | None
    (option,) = _options.from_dataclass(Options, "Panel")
    assert option.kind == list[str]
