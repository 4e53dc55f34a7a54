"""From rows to texts: which field holds the text, and what is left out.

The field is `text_field`, or the first of these that the rows have: `input_ids`, `text`, a conversation
(see `_chats`), the field with the longest prose. Identifiers, hashes, addresses, categories and numbers
are never taken for prose; where nothing else is there, the source is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from llmkern.calibrate.data._chats import CONVERSATIONS, Turn, as_turns, chat_fields, turns_of
from llmkern.calibrate.data._files import Row, is_turns
from llmkern.calibrate.data._reading import Document, Reading, Text

# Rows by which the field is chosen.
_SAMPLE = 64
# A field is prose if it has so many words on average, and so many letters among its characters.
_WORDS, _LETTERS = 4, 0.4
_SHARED_WORDS = 16
_IDEOGRAPHS_PER_WORD = 2


def documents(rows: Iterable[Row], name: str, reading: Reading) -> Iterator[Document]:
    """The texts (or tokens) of rows, in order; what was chosen and left out is said.

    Args:
        rows: of one source.
        name: of the source, for messages.
        reading: how it is read.

    Raises:
        ValueError: no rows, no field that holds text, a value in it that is none.
    """
    reading.field_used = True
    numbered = (Row(row.place, _named(row.value, row.place, name, reading)) for row in rows)
    sample = list(islice(numbered, _SAMPLE))
    if not sample:
        raise ValueError(f"{reading.argument}: got no rows in {name}, expected some")
    field = _choose([row.value for row in sample], name, reading)
    if not all(isinstance(row.value, _Bare) for row in sample):
        reading.said(f"{reading.argument}: {name}: {field.said} is read")
    total = empty = 0
    refused: list[str] = []
    try:
        for row in chain(sample, numbered):
            total += 1
            found = field.documents(row, refused)
            empty += not found
            yield from found
        if total == len(refused):
            raise ValueError(
                f"{reading.argument}: got conversations in {name} that the tokenizer's chat template "
                f"refuses, expected others ({refused[0]})"
            )
    finally:
        _say_left_out(name, reading, total, empty, refused)


class _Bare(dict[str, Any]):
    """A row that had no names of its own."""


def _say_left_out(name: str, reading: Reading, total: int, empty: int, refused: list[str]) -> None:
    argument, empty = reading.argument, empty - len(refused)
    if empty:
        reading.said(f"{argument}: {name}: {empty} of {total} rows are empty and left out")
    if refused:
        reading.said(
            f"{argument}: {name}: {len(refused)} of {total} rows are left out, because the tokenizer's "
            f"chat template refuses them ({refused[0]})"
        )


def _named(value: Any, place: str, name: str, reading: Reading) -> Mapping[str, Any]:
    """A row with names, also where it is nothing but a text, a conversation or tokens."""
    if isinstance(value, Mapping):
        return {column: _unzipped(cell) for column, cell in value.items()}
    if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
        value = value[0]  # a batch of (tokens, targets)
    if value is None:
        return _Bare()
    if isinstance(value, str):
        return _Bare(text=value)
    if is_turns(value):
        return _Bare(messages=value)
    if hasattr(value, "tolist") or isinstance(value, list | tuple):
        texts = isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
        return _Bare({"text" if texts and value else "input_ids": value})
    raise ValueError(
        f"{reading.argument}: {name}, {place}: got {type(value).__name__}, expected an object with "
        "fields, a text, or tokens"
    )


def _unzipped(value: Any) -> Any:
    """A conversation, also where a table has made a mapping of columns of it; any other value."""
    if isinstance(value, Mapping) and ("role" in value or "from" in value):
        columns = list(value.values())
        if all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns):
            return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    return value


def _choose(sample: list[Mapping[str, Any]], name: str, reading: Reading) -> _Field:
    columns = list(dict.fromkeys(column for row in sample for column in row))
    wanted = reading.text_field
    if wanted is not None:
        if any(_there(row, wanted) and not isinstance(row, _Bare) for row in sample):
            return _Field(wanted, name, reading)
        if all(isinstance(row, _Bare) for row in sample):
            raise ValueError(f"text_field: got {wanted!r}, expected None: {name} has no fields")
        raise ValueError(
            f"text_field: got {wanted!r}, expected one of {_listed(columns)} of {name}"
        )
    for usual in ("input_ids", "text"):
        if any(_holds_data(row.get(usual)) for row in sample):
            return _Field(usual, name, reading)
    for row in sample:
        fields = chat_fields(row)
        if fields is not None:
            return _Chat(" + ".join(fields), name, reading, fields)
    chats = [
        c for c in columns if c not in CONVERSATIONS and any(is_turns(r.get(c)) for r in sample)
    ]
    scores = {name: _prose(texts) / len(sample) for name, texts in _texts(sample).items()}
    best = chats[0] if len(chats) == 1 else max(scores, key=scores.__getitem__, default="")
    if not chats and not scores.get(best) and all(_empty(row.get("text", 0)) for row in sample):
        best = "text"  # what is there may still come
    elif len(chats) > 1 or (not chats and not scores.get(best)):
        raise ValueError(
            f"{reading.argument}: got columns {_listed(columns)} in {name}, expected one called text, or "
            f"text_field=NAME (--text-field NAME): {'several hold' if chats else 'none holds'} "
            f"{'conversations' if chats else 'prose'}"
        )
    return _Field(best, name, reading)


def _listed(columns: list[str]) -> str:
    return ", ".join(map(str, columns)) or "none"


@dataclass
class _Field:
    """A field of rows that holds their texts: strings, conversations or tokens.

    Attributes:
        field: its name, or names with a dot between them.
        name: of the source.
        reading: how it is read.
    """

    field: str
    name: str
    reading: Reading

    @property
    def said(self) -> str:
        """For the user."""
        return f"column {self.field}"

    def documents(self, row: Row, refused: list[str]) -> list[Document]:
        """The documents of a row, none if it is empty.

        Args:
            row: of the source.
            refused: gets the reason where the chat template refuses a conversation.

        Raises:
            ValueError: a value that is no text; names the row.
        """
        if isinstance(row.value, _Bare) and row.value and self.field not in row.value:
            raise ValueError(
                f"{self._where(row)} is expected, as in other entries, got {next(iter(row.value))}"
            )
        value = _lookup(row.value, self.field)
        if _empty(value):
            return []
        if isinstance(value, str):
            return [Text(value)]
        if is_turns(value):
            return self.render(row, as_turns(value, self._where(row)), refused)
        if isinstance(value, list | tuple) and all(isinstance(v, str | None) for v in value):
            return [Text(text) for text in value if not _empty(text)]
        tokens = _tokens(value, row.value.get("attention_mask"))
        if tokens is None:
            got = f"{type(value).__name__} {str(value)[:40]!r}"
            raise ValueError(f"{self._where(row)}: got {got}, expected a text or tokens")
        return list(tokens)

    def render(self, row: Row, turns: list[Turn], refused: list[str]) -> list[Document]:
        """A conversation as the tokenizer's template writes it.

        Raises:
            ValueError: a tokenizer that has none.
        """
        tokenizer = self.reading.tokenizer
        if tokenizer is None:
            raise ValueError("tokenizer: got None, expected a tokenizer, because the data is text")
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"{self.reading.argument}: got conversations ({self.field}) in {self.name}, expected a "
                "tokenizer with a chat template for them, or text_field=NAME (--text-field NAME) for a "
                "column of plain text"
            )
        if not turns:
            return []
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False)
        # Templates refuse a conversation by errors of their own, and trip over what they did not expect.
        except Exception as error:
            refused.append(f"{row.place}: {' '.join(str(error).split()) or type(error).__name__}")
            return []
        return [Text(text, chat=True)]

    def _where(self, row: Row) -> str:
        return f"{self.reading.argument}: {self.name}, {row.place}: {self.field}"


@dataclass
class _Chat(_Field):
    """Fields of rows that are a conversation together.

    Attributes:
        fields: their names.
    """

    fields: tuple[str, ...] = ()

    @property
    def said(self) -> str:
        """For the user."""
        return f"{super().said} (conversations, in the tokenizer's chat template)"

    def documents(self, row: Row, refused: list[str]) -> list[Document]:
        """See `_Field.documents`."""
        try:
            turns = turns_of(row.value, self.fields)
        except ValueError as error:
            where = f"{self.reading.argument}: {self.name}, {row.place}"
            raise ValueError(f"{where}: {error}") from error
        return self.render(row, turns, refused) if turns else []


def _lookup(row: Any, field: str) -> Any:
    """The value of a field; "a.b" is b in a, unless there is a field of that name."""
    if isinstance(row, Mapping) and field in row:
        return row[field]
    first, dot, rest = field.partition(".")
    while dot:
        if isinstance(row, Mapping) and first in row:
            return _lookup(row[first], rest)
        more, dot, rest = rest.partition(".")
        first = f"{first}.{more}"
    return None


def _there(row: Mapping[str, Any], field: str) -> bool:
    return field in row or _lookup(row, field) is not None


def _empty(value: Any) -> bool:
    """Whether there is nothing: None, blanks, an empty list, or what pandas writes for None."""
    if value is None or (isinstance(value, float) and value != value):
        return True
    if isinstance(value, str):
        return not value.strip()
    return hasattr(value, "__len__") and len(value) == 0


def _holds_data(value: Any) -> bool:
    """Whether a value can be read: texts, tokens or a conversation."""
    return not (_empty(value) or isinstance(value, Mapping | bool | int | float | bytes))


def _tokens(value: Any, mask: Any) -> list[list[int]] | None:
    """The tokens of a row, or of a batch of rows, without padding; None if they are none."""
    try:
        table = torch.as_tensor(value)
        kept = None if mask is None else torch.as_tensor(mask).bool()
    except (TypeError, ValueError, RuntimeError):  # ragged, or no numbers
        rows = value if isinstance(value, list | tuple) else []
        if mask is not None and len(mask) != len(rows):
            return None
        nested = [_tokens(row, None if mask is None else mask[i]) for i, row in enumerate(rows)]
        known = [tokens for tokens in nested if tokens]
        return list(chain.from_iterable(known)) if known and len(known) == len(nested) else None
    integral = not (table.is_floating_point() or table.is_complex() or table.dtype == torch.bool)
    if (
        not integral
        or table.dim() not in (1, 2)
        or (kept is not None and kept.shape != table.shape)
    ):
        return None
    lines = table[None] if table.dim() == 1 else table
    masks = [None] * len(lines) if kept is None else list(kept[None] if kept.dim() == 1 else kept)
    return [
        (line if cut is None else line[cut]).tolist()
        for line, cut in zip(lines, masks, strict=True)
    ]


def _texts(sample: list[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The strings of each field, those inside of objects under names with a dot."""
    found: dict[str, list[str]] = {}

    def add(row: Mapping[str, Any], before: str) -> None:
        for name, value in row.items():
            if isinstance(value, Mapping):
                add(value, f"{before}{name}.")
            elif isinstance(value, str) and value.strip():
                found.setdefault(f"{before}{name}", []).append(value)
            elif isinstance(value, list) and value and all(isinstance(v, str) for v in value):
                found.setdefault(f"{before}{name}", []).extend(v for v in value if v.strip())

    for row in sample:
        add(row, "")
    return found


def _prose(values: list[str]) -> float:
    """Letters of texts that are prose; 0 where they are not."""
    words = letters = 0.0
    for value in values:
        seen = sum(not c.isspace() for c in value)
        alphabetic = sum(c.isalpha() for c in value)
        if seen and alphabetic / seen >= _LETTERS and "://" not in value.split()[0]:
            ideographs = sum(c.isalpha() and ord(c) >= 0x3040 for c in value)
            words += len(value.split()) + ideographs / _IDEOGRAPHS_PER_WORD
            letters += alphabetic
    # Many rows may share a long text, such as what questions are about; a short one is a category.
    shared = len(set(values)) <= len(values) // 2
    return letters if words / len(values) >= (_SHARED_WORDS if shared else _WORDS) else 0.0
