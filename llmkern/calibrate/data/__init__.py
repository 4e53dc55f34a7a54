"""Windows of tokens, from text, files, tensors, rows or a Hugging Face dataset.

A source is one of
    int64 tensor [n, seq_len]      windows as they are
    int64 tensor [tokens]          a stream, cut into windows
    path of a .pt / .safetensors   such a tensor (never unpickled)
    path of a file of rows         .jsonl, .json, .csv, .tsv, .parquet: one field of each row
    path of any other file         UTF-8 text; these files may be compressed, too
    path of a directory            its files of one kind, or what `datasets.save_to_disk` has written
    string with white space        the text itself
    any other string               "NAME", "NAME:CONFIG" or "NAME:CONFIG:SPLIT" of a dataset
    list of paths                  one source after the other
    list of other strings          texts
    list, dataset, iterable        rows: mappings, texts, conversations, or tokens
    mapping                        columns, or what a tokenizer returns
    None                           the calibration text that comes with llmkern

Which field of the rows is read is said (`_rows` chooses, `text_field` names it); how texts are joined and
where begin tokens stand is in `_tokens`. Files are read up to 16 M tokens, or what was asked for if that
is more; datasets and iterables from their first row on until there is enough, so that nothing else is
downloaded, and the same rows are read every time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmkern.calibrate.data._files import TOKEN_FILES, is_turns
from llmkern.calibrate.data._reading import Reading, Said, teller
from llmkern.calibrate.data._sources import (
    Source,
    check_text_field,
    existing,
    has_fields,
    is_stream,
    read,
)
from llmkern.calibrate.data._tokens import Stream, tokenize
from llmkern.models import check_reads_text, context_length, vocabulary_size

__all__ = [
    "DEFAULT_SEQ_LEN",
    "TOKEN_FILES",
    "Said",
    "Source",
    "check_text_field",
    "existing",
    "has_fields",
    "is_stream",
    "is_turns",
    "load_tokens",
    "load_windows",
    "teller",
]

DEFAULT_SEQ_LEN = 512
# Tokens of files that a choice is made of.
_ENOUGH = 1 << 24
# Windows of a dataset that are read where nobody says how many.
_MOST_WINDOWS = 4096


def load_windows(
    source: Source,
    model: nn.Module,
    tokenizer: Any = None,
    *,
    seq_len: int | None = None,
    samples: int = 128,
    seed: int = 0,
    text_field: str | None = None,
    argument: str = "calibration",
    said: Said | None = None,
) -> Tensor:
    """A random choice of windows to calibrate `model` with.

    Args:
        source: see the module's head.
        model: sets the vocabulary and the longest window.
        tokenizer: a Hugging Face tokenizer; needed for text only.
        seq_len: tokens per window; by default a tensor's own width, else 512 or the model's context
            if that is shorter.
        samples: windows to take; all, if there are fewer. A text gives disjoint windows first, then
            overlapping ones.
        seed: of the choice; the same seed takes the same windows on every machine.
        text_field: the field of rows that holds their text, "a.b" for one inside of another; None
            chooses, and says which.
        argument: what error messages call the source.
        said: called with a line of text for each choice that was made; None logs them.

    Returns:
        int64 [n, seq_len], n <= samples.

    Raises:
        ValueError: the source is empty, unreadable or shorter than one window, has no such field,
            holds conversations and the tokenizer has no chat template, holds a token outside the
            vocabulary, or the window is longer than the model's context; the model reads no text.
        NotImplementedError: an encoder-decoder model.
    """
    if samples < 1:
        raise ValueError(f"samples: got {samples}, expected at least 1")
    check_reads_text(model)
    seq_len = _check_seq_len(seq_len, model)
    length = seq_len or _default_seq_len(model)
    reading = Reading(tokenizer, argument, text_field, said or teller(shown=False))
    stream = _read(source, reading, samples, seq_len, model)
    generator = torch.Generator().manual_seed(seed)
    if stream.tokens.dim() == 2:
        windows = _own_windows(stream.tokens, seq_len, model, argument)
        chosen = torch.randperm(len(windows), generator=generator)[:samples]
        windows = windows[chosen.sort().values]
    else:
        tokens, inner = _enough(stream, length, argument)
        windows = _begun(_sample(tokens, inner, samples, generator), stream.begin)
    return _check_vocabulary(windows, model, argument)


def load_tokens(
    source: Source,
    model: nn.Module,
    tokenizer: Any = None,
    *,
    seq_len: int | None = None,
    samples: int | None = None,
    text_field: str | None = None,
    argument: str = "data",
    said: Said | None = None,
) -> Tensor:
    """All of `source` as windows that do not overlap, in order; the rest of a stream is dropped.

    Arguments, result and errors are those of `load_windows`, but for

    Args:
        samples: windows after which a dataset or an iterable is not read on, 4096 by default. Files
            and tensors are read whole.
    """
    check_reads_text(model)
    seq_len = _check_seq_len(seq_len, model)
    length = seq_len or _default_seq_len(model)
    reading = Reading(tokenizer, argument, text_field, said or teller(shown=False))
    stream = _read(source, reading, samples or _MOST_WINDOWS, seq_len, model, whole=True)
    if stream.tokens.dim() == 2:
        windows = _own_windows(stream.tokens, seq_len, model, argument)
    else:
        tokens, inner = _enough(stream, length, argument)
        count = len(tokens) // inner
        windows = _begun(tokens[: count * inner].view(count, inner), stream.begin)
    return _check_vocabulary(windows, model, argument)


def _read(
    source: Source,
    reading: Reading,
    samples: int,
    seq_len: int | None,
    model: nn.Module,
    *,
    whole: bool = False,
) -> Stream:
    """Tokens of any source: all of a file with `whole`, as many as are wanted of a dataset."""
    found = read(source, reading)
    wanted = samples * (seq_len or _default_seq_len(model))
    if isinstance(found, Tensor):
        stream = Stream(found)
    else:
        enough = wanted if not found.whole else None if whole else max(wanted, _ENOUGH)
        stream = tokenize(found, reading, enough, samples, seq_len or context_length(model))
    if reading.text_field is not None and not reading.field_used:
        raise ValueError(
            f"text_field: got {reading.text_field!r}, expected None: {reading.argument} has no rows with "
            "fields"
        )
    if stream.cut:
        count = stream.tokens.numel()
        reading.said(f"{reading.argument}: its first {count:,} tokens are read, which is enough")
    return stream


def _check_seq_len(seq_len: int | None, model: nn.Module) -> int | None:
    if seq_len is None:
        return None
    if seq_len < 2:
        raise ValueError(f"seq_len: got {seq_len}, expected at least 2")
    context = context_length(model)
    if context is not None and seq_len > context:
        raise ValueError(
            f"seq_len: got {seq_len}, expected at most the model's context of {context}"
        )
    return seq_len


def _default_seq_len(model: nn.Module) -> int:
    return min(DEFAULT_SEQ_LEN, context_length(model) or DEFAULT_SEQ_LEN)


def _enough(stream: Stream, length: int, argument: str) -> tuple[Tensor, int]:
    """The tokens of a stream, and how many of them a window holds behind its begin."""
    inner = length - len(stream.begin)
    if inner < 1:
        raise ValueError(
            f"seq_len: got {length}, expected more than the {len(stream.begin)} tokens that the "
            "tokenizer puts before a text"
        )
    if len(stream.tokens) < inner:
        raise ValueError(
            f"{argument}: got {len(stream.tokens)} tokens, expected at least one window of {length}"
        )
    return stream.tokens, inner


def _begun(windows: Tensor, begin: tuple[int, ...]) -> Tensor:
    """Windows with the begin tokens before each."""
    return torch.cat([torch.tensor(begin, dtype=torch.int64).expand(len(windows), -1), windows], 1)


def _own_windows(tokens: Tensor, seq_len: int | None, model: nn.Module, argument: str) -> Tensor:
    width = tokens.shape[1]
    if seq_len is not None and width != seq_len:
        raise ValueError(f"{argument}: got windows of {width} tokens, expected seq_len = {seq_len}")
    _check_seq_len(width, model)
    return tokens


def _sample(tokens: Tensor, length: int, samples: int, generator: torch.Generator) -> Tensor:
    disjoint, rest = divmod(len(tokens), length)
    offset = int(torch.randint(rest + 1, (1,), generator=generator))
    starts = torch.randperm(disjoint, generator=generator)[:samples] * length + offset
    if samples > disjoint:
        more = torch.randperm(len(tokens) - length + 1, generator=generator)
        more = more[~torch.isin(more, starts)][: samples - disjoint]
        starts = torch.cat([starts, more])
    return tokens[starts.sort().values[:, None] + torch.arange(length)]


def _check_vocabulary(windows: Tensor, model: nn.Module, argument: str) -> Tensor:
    size = vocabulary_size(model)
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or (size is not None and high >= size):
        bad = low if low < 0 else high
        limit = "" if size is None else f" less than {size}, the size of the model's vocabulary"
        raise ValueError(f"{argument}: got token {bad}, expected tokens of at least 0 and{limit}")
    return windows
