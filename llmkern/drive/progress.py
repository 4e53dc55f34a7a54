"""The progress of a driver, and the lines of its report as a journal keeps them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn

from llmkern._progress import Bar


class Progress:
    """The progress of a driver through its layers.

    On the way out, also by an exception, `record` is called if any layer was changed, so that the
    model's config says what the model holds; after an exception a warning says how far it came.
    """

    def __init__(
        self,
        verb: str,
        participle: str,
        total: int,
        *,
        shown: bool,
        record: Callable[[], None] | None = None,
    ) -> None:
        """Open the bar.

        Args:
            verb, participle: for messages, as in "quantize", "quantized".
            total: layers (or blocks) to do.
            shown: say how far it is (see `llmkern._progress`).
            record: see above.
        """
        self._verb, self._participle = verb, participle
        self._total = total
        self._done: list[str] = []
        self._record = record
        self._bar = Bar(verb, total, "layer", shown=shown)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._bar.close()
        done = self._done
        if done and self._record is not None:
            self._record()
        if done and exc is not None:
            warnings.warn(
                f"{self._verb}: stopped after {len(done)} of {self._total} layers; {done[0]} to "
                f"{done[-1]} are already {self._participle}",
                RuntimeWarning,
                stacklevel=3,
            )

    def say(self, text: str) -> None:
        """Show what is being done."""
        self._bar.say(text)

    @contextmanager
    def layer(self, name: str) -> Iterator[None]:
        """Work on the layer `name`: shown, without gradients, and named in every ValueError."""
        self.say(name)
        try:
            with torch.no_grad():
                yield
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def finish(self, name: str, **figures: str) -> None:
        """Count the layer `name` as done, and show its figures."""
        self._done.append(name)
        self._bar.update(**figures)

    def restore(self, name: str) -> None:
        """Count the layer `name`, which an earlier run has done."""
        self._done.append(name)
        self._bar.skip()


class Lines:
    """The lines of a driver's report, as a journal keeps them with each block."""

    def __init__(self, progress: Progress, lines: list[Any], kind: type) -> None:
        """Follow the list.

        Args:
            progress: counts the layers of restored lines as done.
            lines: of the report, one per layer, with a `name`; grows as the driver works.
            kind: their dataclass.
        """
        self._progress, self._lines, self._kind = progress, lines, kind
        self._taken = len(lines)

    def take(self, index: int) -> dict[str, Any]:
        """What has been added since the last block."""
        new = self._lines[self._taken :]
        self._taken = len(self._lines)
        return {"lines": [dataclasses.asdict(line) for line in new]}

    def give(self, index: int, block: nn.Module, notes: dict[str, Any]) -> None:
        """Add the lines of a block again."""
        for entry in notes["lines"]:
            # JSON has no tuples.
            fields = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
            line = self._kind(**fields)
            self._lines.append(line)
            self._progress.restore(line.name)
        self._taken = len(self._lines)
