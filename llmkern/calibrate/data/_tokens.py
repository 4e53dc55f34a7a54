"""From texts to a stream of tokens, and what stands at the beginning of each window of it.

Texts follow each other with a blank line between them, as in the perplexities that are published for
GPTQ and its successors; conversations follow each other as the chat template ends them. No end token is
put between them, because not every model was trained on one. What a tokenizer puts before every text by
itself, its begin token, goes to the start of every window and is nowhere else; what it puts behind every
text is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkern.calibrate.data._reading import Reading, Text
from llmkern.calibrate.data._sources import Found

_BETWEEN = "\n\n"
# Characters that are tokenized at a time; a single text is never divided.
_CHUNK = 1 << 16


class Stream(NamedTuple):
    """Tokens of a source.

    Attributes:
        tokens: int64 [tokens], to be cut into windows; or [n, seq_len], windows as they are.
        begin: tokens at the start of every window that is cut.
        cut: the source had more.
    """

    tokens: Tensor
    begin: tuple[int, ...] = ()
    cut: bool = False


def tokenize(
    found: Found, reading: Reading, enough: int | None, rows: int, widest: int | None
) -> Stream:
    """The tokens of texts; or those that a source has, joined unless all have one length.

    Args:
        found: the texts or tokens.
        reading: with the tokenizer.
        enough: tokens after which no more is read; None reads all.
        rows: of tokens, likewise: so many at least.
        widest: longest window; a single row of more tokens is a stream.

    Raises:
        ValueError: no tokenizer for text, no text at all, text and tokens mixed.
    """
    documents = found.documents
    first = next(documents, None)
    if first is None:
        raise ValueError(f"{reading.argument}: got no text in {found.name}, expected some")
    every = chain([first], documents)
    if isinstance(first, Text):
        return _texts(_checked(every, Text, reading), reading, enough)
    held, cut = _taken(_checked(every, list, reading), enough, rows)
    if not held:
        raise ValueError(f"{reading.argument}: got no tokens in {found.name}, expected some")
    width = len(held[0])
    if all(len(row) == width for row in held) and (len(held) > 1 or width <= (widest or width)):
        return Stream(torch.tensor(held, dtype=torch.int64), cut=cut)
    begin, end = frame(reading.tokenizer) if callable(reading.tokenizer) else ([], [])
    flat = [token for row in held for token in _bare(row, begin, end)]
    return Stream(torch.tensor(flat, dtype=torch.int64), tuple(begin), cut)


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before, and behind, every text by itself."""
    bare, framed = _encode(tokenizer, "a", False), _encode(tokenizer, "a", True)
    bos = getattr(tokenizer, "bos_token_id", None)
    if not bare or bare[0] == bos:  # nothing to find them by, or it always puts it there
        return ([bos] if bos is not None and framed[:1] == [bos] else []), []
    for i in range(len(framed) - len(bare) + 1):
        if framed[i : i + len(bare)] == bare:
            return framed[:i], framed[i + len(bare) :]
    return ([bos] if bos is not None and framed[0] == bos else []), []


def _checked(documents: Iterator[Any], kind: type, reading: Reading) -> Iterator[Any]:
    for document in documents:
        if not isinstance(document, kind):
            raise ValueError(f"{reading.argument}: got texts and tokens mixed, expected one kind")
        yield document


def _texts(texts: Iterator[Text], reading: Reading, enough: int | None) -> Stream:
    tokenizer = reading.tokenizer
    if tokenizer is None:
        raise ValueError("tokenizer: got None, expected a tokenizer, because the data is text")
    if not callable(tokenizer):
        raise ValueError(f"tokenizer: got {type(tokenizer).__name__}, expected a tokenizer")
    begin, bos = frame(tokenizer)[0], getattr(tokenizer, "bos_token", None)
    pieces: list[Tensor] = []
    held: list[str] = []
    size = count = 0
    between, cut = "", False
    for text, chat in texts:
        if enough is not None and count >= enough:
            cut = True
            break
        if chat and not begin and bos and text.startswith(bos):
            begin = [int(tokenizer.bos_token_id)]  # the template puts it there
        held += [between, text]
        size += len(text)
        between = "" if chat else _BETWEEN
        if size >= (_CHUNK if enough is None else min(_CHUNK, enough - count)):
            pieces.append(_inside(tokenizer, "".join(held), begin))
            count, size = count + len(pieces[-1]), 0
            held.clear()
    if held:
        pieces.append(_inside(tokenizer, "".join(held), begin))
    return Stream(torch.cat(pieces), tuple(begin), cut)


def _inside(tokenizer: Any, text: str, begin: list[int]) -> Tensor:
    """The tokens of a text without begin tokens, which go to the start of windows."""
    tokens = torch.tensor(_encode(tokenizer, text, False), dtype=torch.int64)
    # Where one token is both, it also ends texts.
    ids = [t for t in begin if t != getattr(tokenizer, "eos_token_id", None)]
    return tokens[~torch.isin(tokens, torch.tensor(ids, dtype=torch.int64))] if ids else tokens


def _encode(tokenizer: Any, text: str, special: bool) -> list[int]:
    # verbose=False: that the text is longer than one window is no reason for a warning.
    ids = list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    end, name = (getattr(tokenizer, key, None) for key in ("eos_token_id", "eos_token"))
    # Some end every text, whatever they are told.
    ended = not special and ids[-1:] == [end] and not (name and text.rstrip().endswith(name))
    return ids[:-1] if ended else ids


def _taken(
    rows: Iterator[list[int]], enough: int | None, least: int
) -> tuple[list[list[int]], bool]:
    """The rows to be used, and whether there are more."""
    held: list[list[int]] = []
    count = 0
    for row in rows:
        if enough is not None and count >= enough and len(held) >= least:
            return held, True
        if row:
            held.append(row)
            count += len(row)
    return held, False


def _bare(row: list[int], begin: list[int], end: list[int]) -> list[int]:
    """A row without what the tokenizer has put around its text."""
    if begin and row[: len(begin)] == begin:
        row = row[len(begin) :]
    return row[: -len(end)] if end and row[-len(end) :] == end else row
