"""One reading of a source: what it is read with, and what is said about it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from llmkern._progress import note

Said = Callable[[str], None]

_log = logging.getLogger("llmkern")


class Text(NamedTuple):
    """A text of a source.

    Attributes:
        text: not blank.
        chat: a conversation as the tokenizer's template writes it, with its own beginning and end.
    """

    text: str
    chat: bool = False


# A text, or tokens of one.
Document = Text | list[int]


@dataclass
class Reading:
    """How a source is read.

    Attributes:
        tokenizer: needed for text.
        argument: what messages call the source.
        text_field: the field of its rows that holds the text; None chooses.
        said: called with a line of text for each choice that was made.
        field_used: the source has rows, to which `text_field` applies.
    """

    tokenizer: Any
    argument: str
    text_field: str | None
    said: Said
    field_used: bool = False


def teller(notes: list[str] | None = None, *, shown: bool) -> Said:
    """A function for what is said about data.

    Args:
        notes: of a report, gets it.
        shown: on standard error, too; else it is logged.
    """

    def said(text: str) -> None:
        if notes is not None:
            notes.append(text)
        if not shown:
            _log.info(text)
            return
        note(text)

    return said
