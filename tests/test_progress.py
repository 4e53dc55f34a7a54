"""Progress is said in whole lines where nobody looks, and no stream can end the work."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from typing import Any

import pytest

from llmkern._progress import STDERR, STDOUT, Bar, duration, lines_every, note


class Broken(io.StringIO):
    """A pipe that nobody reads any more."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self) -> None:
        raise BrokenPipeError(32, "Broken pipe")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


def encoded(name: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=name)


STREAMS: dict[str, Any] = {
    "none": lambda: None,
    "closed": closed,
    "broken_pipe": Broken,
    "ascii": lambda: encoded("ascii"),
    "cp1252": lambda: encoded("cp1252"),
    "no_attributes": object,
}


@pytest.mark.parametrize("kind", STREAMS)
def test_work_goes_on_whatever_the_stream(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, stream in (("stdout", STDOUT), ("stderr", STDERR)):
        monkeypatch.setattr(sys, name, STREAMS[kind]())
        assert stream.write("→ 模型\n") == 5
        stream.flush()
        assert not stream.isatty()
        assert stream.encoding
    note("→ 模型")
    with lines_every(0.01), Bar("work → 模型", 2, "layer") as bar:
        bar.say("first → 模型")
        time.sleep(0.05)
        bar.update(loss="1 →")
        bar.update()


def test_what_can_be_encoded_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = encoded("cp1252")
    monkeypatch.setattr(sys, "stderr", stream)
    note("20 × 3 → 模型")
    stream.flush()
    assert stream.buffer.getvalue().decode("cp1252") == "20 × 3 ? ??\n"  # type: ignore[attr-defined]


def test_lines_say_how_far_and_how_long(capsys: pytest.CaptureFixture[str]) -> None:
    with lines_every(0.05), Bar("quantize", 10, "layer") as bar:
        bar.skip()
        bar.update()
        bar.say("layers.1")
        bar.update(loss="1e-3")
        time.sleep(0.25)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 3
    for line in lines[:-1]:
        assert line.startswith("quantize: 3 of 10 layers, 0 s, about ")
        assert line.endswith("s left, layers.1, loss 1e-3")
    # What an earlier run did says nothing about what is left: 7 more at 0.125 s or less each.
    assert {line.split("about ")[1].split(" left")[0] for line in lines[:-1]} <= {"0 s", "1 s"}


def test_no_control_characters_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("work", 3, "step") as bar:
        for _ in range(3):
            bar.update(loss="0.5")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "work: 3 of 3 steps, 0 s, loss 0.5\n"


def test_a_bar_is_closed_with_what_it_came_to(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(ValueError), Bar("work", 3, "step") as bar:
        bar.update()
        raise ValueError("stop")
    assert capsys.readouterr().err.startswith("work: 1 of 3 steps, 0 s")
    bar.close()
    assert capsys.readouterr().err == ""


def test_nothing_is_said_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("work", 1, "step", shown=False) as bar:
        bar.say("x")
        bar.skip()
        bar.update()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    with Bar("work", 4, "layer", initial=1) as bar:
        bar.skip()
        bar.say("layers.0")
        note("a line above")
        bar.update(loss="0.5")
    shown = terminal.getvalue()
    assert "layers.0" in shown
    assert "3/4" in shown
    assert "\ra line above\n" in shown or "a line above\n" in shown


def test_seconds_must_be_positive() -> None:
    with pytest.raises(ValueError, match="seconds: got 0"), lines_every(0):
        pass


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (97300, "1 d 3 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
