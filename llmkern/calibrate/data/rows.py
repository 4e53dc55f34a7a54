"""Rows and conversations of files, for what reads more of a row than its text."""

from llmkern.calibrate.data._chats import CONTEXTS, CONVERSATIONS, PAIRS, turns_of
from llmkern.calibrate.data._files import Row, has_rows, is_turns, json_lines, read_rows, read_text

__all__ = [
    "CONTEXTS",
    "CONVERSATIONS",
    "PAIRS",
    "Row",
    "has_rows",
    "is_turns",
    "json_lines",
    "read_rows",
    "read_text",
    "turns_of",
]
