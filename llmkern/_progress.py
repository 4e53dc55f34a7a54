"""What is said while work goes on: bars on a terminal, a plain line from time to time in a log file.

Work never ends for want of a place to say something: what a stream cannot encode is replaced, and a
stream that is closed, full or not there is left alone.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from types import TracebackType
from typing import Any

# Seconds between two lines, where standard error is no terminal.
_INTERVAL: ContextVar[float] = ContextVar("interval", default=60.0)


class Stream:
    """Standard output or standard error, as it is when something is written."""

    def __init__(self, name: str) -> None:
        """Stand for `sys.stdout` or `sys.stderr`, by name."""
        self._name = name

    @property
    def encoding(self) -> str:
        """Of the stream; ASCII where it says none."""
        return getattr(self._stream, "encoding", None) or "ascii"

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        with contextlib.suppress(
            OSError, ValueError, AttributeError
        ):  # closed, or no stream at all
            return bool(self._stream.isatty())
        return False

    def write(self, text: str) -> int:
        """Write what can be written."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self.encoding
                self._stream.write(text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Flush, if that can be done."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._stream.flush()

    @property
    def _stream(self) -> Any:
        return getattr(sys, self._name)


STDOUT, STDERR = Stream("stdout"), Stream("stderr")


def note(text: str) -> None:
    """Write a line to standard error, above a bar that is there."""
    if STDERR.isatty():
        from tqdm import tqdm

        tqdm.write(text, file=STDERR)
    else:
        STDERR.write(f"{text}\n")
        STDERR.flush()


@contextlib.contextmanager
def lines_every(seconds: float) -> Iterator[None]:
    """So many seconds between two lines of the bars that are opened inside; 60 otherwise."""
    if not seconds > 0:
        raise ValueError(f"seconds: got {seconds}, expected a positive number")
    token = _INTERVAL.set(float(seconds))
    try:
        yield
    finally:
        _INTERVAL.reset(token)


class Bar:
    """How far some work is, to be closed in the end."""

    def __init__(
        self, what: str, total: int, unit: str, *, shown: bool = True, initial: int = 0
    ) -> None:
        """Open it.

        Args:
            what: is being done, before each line.
            total: units to do.
            unit: in the singular.
            shown: say anything.
            initial: units that are done already.
        """
        self._bar: Any = None
        self._lines: _Lines | None = None
        if shown and STDERR.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=initial, unit=unit, file=STDERR, disable=False)
        elif shown:
            self._lines = _Lines(what, total, unit, initial)

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def say(self, text: str) -> None:
        """What is being done now."""
        if self._bar is not None:
            self._bar.set_description(text)
        elif self._lines is not None:
            self._lines.doing = text

    def update(self, **figures: str) -> None:
        """One more unit is done; `figures` of it are shown."""
        if self._bar is not None:
            if figures:
                self._bar.set_postfix(figures, refresh=False)
            self._bar.update()
        elif self._lines is not None:
            self._lines.figures = figures
            self._lines.done += 1

    def skip(self) -> None:
        """One more unit was done before; it says nothing about how long the others take."""
        if self._bar is not None:
            self._bar.initial += 1
            self._bar.update()
        elif self._lines is not None:
            self._lines.initial += 1
            self._lines.done += 1

    def close(self) -> None:
        """Say for the last time how far it came."""
        if self._bar is not None:
            self._bar.close()
        elif self._lines is not None:
            self._lines.close()


class _Lines:
    """A thread that writes a line from time to time, also while one unit takes long."""

    def __init__(self, what: str, total: int, unit: str, initial: int) -> None:
        self._what, self._total, self._unit = what, total, unit
        self.initial = self.done = initial
        self.doing = ""
        self.figures: dict[str, str] = {}
        self._started = time.monotonic()
        self._stop = threading.Event()
        self._interval = _INTERVAL.get()
        self._thread = threading.Thread(target=self._run, name=f"progress of {what}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            self.doing = ""
            note(self._line())

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            note(self._line())

    def _line(self) -> str:
        spent = time.monotonic() - self._started
        plural = "es" if self._unit.endswith("ch") else "s"
        unit = self._unit if self._total == 1 else f"{self._unit}{plural}"
        parts = [f"{self.done} of {self._total} {unit}", duration(spent)]
        new, rest = self.done - self.initial, self._total - self.done
        if new > 0 and rest > 0:
            parts.append(f"about {duration(spent / new * rest)} left")
        parts += [self.doing] if self.doing else []
        parts += [f"{name} {value}" for name, value in self.figures.items()]
        return f"{self._what}: {', '.join(parts)}"


def duration(seconds: float) -> str:
    """Seconds for people: "40 s", "3 min 20 s", "2 h 5 min", "1 d 3 h"."""
    whole = round(seconds)
    for name, size, below, smaller in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // smaller} {below}"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"
