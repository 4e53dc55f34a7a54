"""What a method is: all that commands, recipes, preflight, comparison and reports ask of one.

A method is one file with one `Method` in it, and its place in the list `METHODS` of its driver. What it
does to a model is its `work`; `llmkern.drive.layers` has those that go through the layers of decoder
blocks, and a driver may have others of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmkern.drive.shapes import Shapes, Tokens


@dataclass(frozen=True)
class Needs:
    """What a method needs beside the model.

    Attributes:
        tokens: calibration windows.
        gradients: of the loss on some of them.
    """

    tokens: bool = False
    gradients: bool = False

    def __str__(self) -> str:
        needs = [name for name in ("tokens", "gradients") if getattr(self, name)]
        return ", ".join(needs) or "nothing"


class MethodWork:
    """What a method does to a model, as far as it can be told before: the part of it that is planned.

    `settings` is an instance of the method's dataclass of options everywhere.
    """

    def needs(self, settings: Any) -> Needs:
        """What has to be there."""
        return Needs()

    def nbytes(self, settings: Any, shapes: Shapes, tokens: Tokens) -> int:
        """Bytes held at the peak, beside the weights, hidden states and activations of one batch."""
        return 0

    def nbytes_after(self, settings: Any, after: Shapes, batch: int, tokens: Tokens) -> int:
        """Bytes at the peak of what follows the walk, such as a training, weights included."""
        return 0

    def nbytes_journal(self, settings: Any, after: Shapes, tokens: Tokens) -> int:
        """Bytes on the disk of an unfinished run: the blocks, and hidden states, old and new."""
        hidden = 2 * tokens.hidden(after) if self.needs(settings).tokens else 0
        return after.blocks_nbytes() + hidden


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method of a driver.

    Attributes:
        name: how it is asked for.
        about: one line for people: what it does.
        options: frozen dataclass of its options, which checks them when it is made; its docstring has a
            line on each, of which commands make their help.
        compared: rows of `llmkern compare`: options of the driver by label.
    """

    name: str
    about: str
    options: type
    compared: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
