"""Windows of tokens, from text, files, tensors or a Hugging Face dataset.

A source is one of
    int64 tensor [n, seq_len]      windows as they are
    int64 tensor [tokens]          a stream, cut into windows
    path of a .pt / .safetensors   such a tensor (never unpickled)
    path of any other file         UTF-8 text; a list of paths is one text
    string with white space        the text itself
    any other string               "NAME", "NAME:CONFIG" or "NAME:CONFIG:SPLIT" of a dataset
    None                           the calibration text that comes with llmkern
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkern._dtypes import dtype_name
from llmkern.assets import calibration_text
from llmkern.models import context_length, vocabulary_size

Source = Tensor | str | Path | Sequence[str | Path] | None

DEFAULT_SEQ_LEN = 512
TOKEN_FILES = (".pt", ".pth", ".safetensors")

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def load_windows(
    source: Source,
    model: nn.Module,
    tokenizer: Any = None,
    *,
    seq_len: int | None = None,
    samples: int = 128,
    seed: int = 0,
    argument: str = "calibration",
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
        argument: what error messages call the source.

    Returns:
        int64 [n, seq_len], n <= samples.

    Raises:
        ValueError: the source is empty, unreadable or shorter than one window, holds a token outside
            the vocabulary, or the window is longer than the model's context.
    """
    if samples < 1:
        raise ValueError(f"samples: got {samples}, expected at least 1")
    seq_len = _check_seq_len(seq_len, model)
    length = seq_len or _default_seq_len(model)
    tokens = _read(source, tokenizer, argument, samples * length)
    generator = torch.Generator().manual_seed(seed)
    if tokens.dim() == 2:
        windows = _own_windows(tokens, seq_len, model, argument)
        chosen = torch.randperm(len(windows), generator=generator)[:samples]
        windows = windows[chosen.sort().values]
    else:
        windows = _sample(_enough(tokens, length, argument), length, samples, generator)
    return _check_vocabulary(windows, model, argument)


def load_tokens(
    source: Source,
    model: nn.Module,
    tokenizer: Any = None,
    *,
    seq_len: int | None = None,
    argument: str = "data",
) -> Tensor:
    """All of `source` as windows that do not overlap, in order; the rest of a stream is dropped.

    Arguments, result and errors are those of `load_windows`.
    """
    seq_len = _check_seq_len(seq_len, model)
    length = seq_len or _default_seq_len(model)
    tokens = _read(source, tokenizer, argument, None)
    if tokens.dim() == 2:
        windows = _own_windows(tokens, seq_len, model, argument)
    else:
        count = len(_enough(tokens, length, argument)) // length
        windows = tokens[: count * length].view(count, length)
    return _check_vocabulary(windows, model, argument)


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


def _read(source: Source, tokenizer: Any, argument: str, wanted: int | None) -> Tensor:
    """Tokens of any source, int64, one- or two-dimensional."""
    if isinstance(source, Tensor):
        return _check_integers(source, argument)
    if source is None:
        source = calibration_text()
    if isinstance(source, (str, Path)):
        path = _existing(source)
        if path is not None and path.suffix in TOKEN_FILES:
            return _check_integers(_tensor_file(path, argument), f"{argument}: {path}")
        if path is not None:
            return _tokenize(_text_file(path, argument), tokenizer, argument)
        if isinstance(source, str) and (not source.strip() or any(c.isspace() for c in source)):
            return _tokenize(source, tokenizer, argument)
        return _dataset(str(source), tokenizer, argument, wanted)
    if not isinstance(source, Sequence):
        raise ValueError(
            f"{argument}: got {type(source).__name__}, expected text, a path, paths or a token tensor"
        )
    texts = []
    for entry in source:
        path = _existing(entry)
        if path is None:
            raise ValueError(f"{argument}: got {str(entry)!r}, expected the path of a text file")
        texts.append(_text_file(path, argument))
    return _tokenize("\n".join(texts), tokenizer, argument)


def _existing(source: str | Path) -> Path | None:
    try:
        return Path(source) if Path(source).is_file() else None
    except (OSError, ValueError):  # a text that is too long, or too strange, for a path
        return None


def _text_file(path: Path, argument: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{argument}: got {path}, expected UTF-8 text ({error.reason})") from error


def _tensor_file(path: Path, argument: str) -> Tensor:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            held = load_file(path)
            value: Any = (
                next(iter(held.values())) if len(held) == 1 else held.get("input_ids", held)
            )
        else:
            value = torch.load(path, weights_only=True, map_location="cpu")
    # Damaged files raise whatever the reader trips over first.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{argument}: got {path}, expected a readable token tensor ({reason})"
        ) from error
    if not isinstance(value, Tensor):
        raise ValueError(f"{argument}: got {type(value).__name__} in {path}, expected one tensor")
    return value


def _check_integers(tokens: Tensor, argument: str) -> Tensor:
    if tokens.dtype not in _INTEGERS or tokens.dim() not in (1, 2):
        dtype = dtype_name(tokens.dtype)
        raise ValueError(
            f"{argument}: got {dtype} {list(tokens.shape)}, expected int64 [n, seq_len] or [tokens]"
        )
    if tokens.numel() == 0:
        raise ValueError(f"{argument}: got no tokens ({list(tokens.shape)}), expected some")
    return tokens.to(device="cpu", dtype=torch.int64)


def _tokenize(text: str, tokenizer: Any, argument: str) -> Tensor:
    if tokenizer is None:
        raise ValueError("tokenizer: got None, expected a tokenizer, because the data is text")
    if not text.strip():
        raise ValueError(f"{argument}: got an empty text, expected some")
    # verbose=False: that the text is longer than one window is no reason for a warning.
    ids = tokenizer(text, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _dataset(name: str, tokenizer: Any, argument: str, wanted: int | None) -> Tensor:
    """Text column of a Hugging Face dataset, row by row until there are `wanted` tokens."""
    if Path(name).suffix in (*TOKEN_FILES, ".txt", ".md", ".json"):
        raise ValueError(f"{argument}: got {name}, expected an existing file")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(
            f"{argument}: got {name!r}, which is no file; a dataset of that name needs the package "
            "datasets (pip install 'llmkern[datasets]')"
        ) from error
    path, config, split = [*name.split(":"), "", ""][:3]
    rows = datasets.load_dataset(path, config or None, split=split or "train")
    columns = rows.column_names
    column = "text" if "text" in columns else _text_column(rows[0] if len(rows) else {})
    if column is None:
        raise ValueError(
            f"{argument}: got columns {columns} in {name}, expected one that holds text"
        )
    texts, count = [], 0
    for row in rows:
        if wanted is not None and count >= wanted:
            break
        if row[column].strip():
            texts.append(_tokenize(row[column], tokenizer, argument))
            count += len(texts[-1])
    if not texts:
        raise ValueError(f"{argument}: got no text in {name}, expected some")
    return torch.cat(texts)


def _text_column(row: dict[str, Any]) -> str | None:
    return next((name for name, value in row.items() if isinstance(value, str)), None)


def _enough(tokens: Tensor, length: int, argument: str) -> Tensor:
    if len(tokens) < length:
        raise ValueError(
            f"{argument}: got {len(tokens)} tokens, expected at least one window of {length}"
        )
    return tokens


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
