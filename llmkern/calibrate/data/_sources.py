"""What a source is, and the texts or tokens that come out of it."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkern._dtypes import dtype_name
from llmkern.assets import calibration_text
from llmkern.calibrate.data._files import (
    TEXT_FILES,
    TOKEN_FILES,
    Row,
    ending,
    has_rows,
    is_known,
    is_turns,
    read_rows,
    read_text,
    rows_of,
)
from llmkern.calibrate.data._hub import (
    dataset_rows,
    hub_rows,
    is_dataset,
    is_dataset_name,
    is_saved,
    is_splits,
    one_split,
    saved_rows,
)
from llmkern.calibrate.data._reading import Document, Reading, Text
from llmkern.calibrate.data._rows import documents

Source = Tensor | str | Path | Mapping[str, Any] | Iterable[Any] | None

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)
# Longest text that is taken for the path of a file that is not there.
_LONGEST_PATH = 255
# Words of a path that name a split.
_TRAIN = frozenset({"train", "training"})
_HELD_OUT = frozenset({"test", "testing", "validation", "valid", "val", "dev", "eval"})
# Files of a directory that say something about its data.
_ABOUT = (
    *("readme", "license", "licence", "notice", "citation", "changelog"),
    *("dataset_info", "dataset_dict", "state"),
)


class Found(NamedTuple):
    """What a source holds.

    Attributes:
        documents: its texts or tokens, in order.
        whole: it lies here and is read as a whole; else it is read only until there is enough.
        name: for messages.
    """

    documents: Iterator[Document]
    whole: bool
    name: str = "it"


def read(source: Source, reading: Reading) -> Tensor | Found:
    """The tokens of a source, int64 of one or two dimensions, or its documents.

    Raises:
        ValueError: no such source, or one that is empty or unreadable.
    """
    if source is None:
        source = calibration_text()
    if isinstance(source, os.PathLike):
        source = Path(source)
    if _is_array(source):
        integers = source.dtype.kind in "iu"  # type: ignore[union-attr]
        source = torch.as_tensor(source.astype("int64") if integers else source)  # type: ignore[union-attr]
    if isinstance(source, Tensor):
        return _check_integers(source, reading.argument)
    if isinstance(source, str | Path):
        return _of_text(source, reading)
    source = _entries(source, reading.argument)
    if is_splits(source):
        given = f"{reading.argument}: got"
        source = one_split(source, given, f"{reading.argument}=DATASETS[SPLIT]")  # type: ignore[arg-type]
    if is_dataset(source):
        name = f"the {type(source).__name__}"
        return Found(documents(dataset_rows(source, name, reading.argument), name, reading), False)
    if isinstance(source, Mapping):
        return Found(documents(_mapping(source, reading), "the mapping", reading), True)
    if isinstance(source, Sequence) and not isinstance(source, bytes | bytearray | memoryview):
        return _of_list(list(source), reading)
    if isinstance(source, Iterable) and not isinstance(source, Sequence):
        name = f"the {type(source).__name__}"
        return Found(documents(_items(source), name, reading), False)
    raise ValueError(
        f"{reading.argument}: got {type(source).__name__}, expected text, a path, paths, texts, rows, a "
        "dataset or a token tensor"
    )


def existing(source: str | Path) -> Path | None:
    """The path of a file or directory that is there."""
    try:
        for path in (Path(source), Path(source).expanduser()):
            if str(source) and path.exists():
                return path
    except (OSError, ValueError, RuntimeError):  # too long, or too strange, for a path
        pass
    return None


def is_stream(source: Source) -> bool:
    """Whether a source is a dataset or an iterable, of which no more is read than is needed."""
    if isinstance(source, str):
        return _is_hub_name(source)
    lies_here = source is None or isinstance(source, Tensor | Path | Sequence)
    return is_dataset(source) or not (lies_here or isinstance(source, Mapping))


def _is_hub_name(source: str) -> bool:
    return is_dataset_name(source) and existing(source) is None


def has_fields(source: Source) -> bool:
    """Whether a source may have rows with fields: neither tokens nor plain text."""
    if isinstance(source, list | tuple):
        return any(isinstance(e, Mapping | str | Path) and has_fields(e) for e in source)
    if isinstance(source, str | Path):
        path = existing(source)
        if path is not None:
            return path.is_dir() or has_rows(path)
        return isinstance(source, str) and _is_hub_name(source)
    return source is not None and not isinstance(source, Tensor)


def check_text_field(text_field: str | None, *sources: Source) -> None:
    """Refuse a field where none of the sources has any.

    Raises:
        ValueError: says so.
    """
    if text_field is not None and not any(map(has_fields, sources)):
        raise ValueError(
            f"text_field: got {text_field!r}, expected None: no data with fields is given"
        )


def _entries(source: Any, argument: str) -> Any:
    """A table of another package as a list of its rows; what has no rows in order is refused."""
    for name, options in (("to_pylist", ()), ("to_dicts", ()), ("to_dict", ("records",))):
        if hasattr(source, name) and hasattr(source, "columns"):
            return getattr(source, name)(*options)
    if isinstance(source, set | frozenset | io.IOBase):
        kind = type(source).__name__
        wanted = "its path" if isinstance(source, io.IOBase) else "a list: a set has no order"
        raise ValueError(f"{argument}: got a {kind}, expected {wanted}")
    return source


def _is_array(value: Any) -> bool:
    """Whether a value is an array of numbers."""
    return type(value).__module__ == "numpy" and value.dtype.kind in "iufb"


def _of_text(source: str | Path, reading: Reading) -> Tensor | Found:
    argument = reading.argument
    path = existing(source)
    if path is not None:
        return _of_path(path, reading)
    if isinstance(source, Path) or _is_missing(source):
        raise ValueError(f"{argument}: got {source}, expected an existing file or directory")
    if not source.strip():
        raise ValueError(f"{argument}: got an empty text, expected some")
    if any(c.isspace() for c in source) or not is_dataset_name(source):
        return Found(iter([Text(source)]), True)
    return Found(documents(hub_rows(source, argument), source, reading), False)


def _is_missing(text: str) -> bool:
    """Whether a text reads like the path of a file."""
    line = text.strip()
    if len(line) > _LONGEST_PATH or "\n" in line:
        return False
    bare = line.isascii() and not any(c.isspace() for c in line) and not is_dataset_name(line)
    return is_known(Path(line)) or (
        bare and (any(c in line for c in "/\\") or line.startswith((".", "~")))
    )


def _of_path(path: Path, reading: Reading) -> Tensor | Found:
    argument = reading.argument
    if not path.is_dir():
        if ending(path) in TOKEN_FILES:
            return _check_integers(_tensor_file(path, argument), f"{argument}: {path}")
        return Found(_of_files([path], str(path), reading), True, str(path))
    if is_saved(path):
        return Found(documents(saved_rows(path, argument), str(path), reading), False)
    if (path / "config.json").is_file():
        raise ValueError(f"{argument}: got {path}, which holds a model, expected data")
    files = sorted(p for p in path.rglob("*") if p.is_file() and _is_data(p, path))
    rows = [p for p in files if has_rows(p)]
    if not files or 0 < len(rows) < len(files):
        kinds = ", ".join(sorted({ending(p) for p in files}))
        raise ValueError(
            f"{argument}: got the directory {path} with "
            + (f"files of {kinds}, expected text or rows" if files else "no text and no rows in it")
            + ", or a list of files"
        )
    train = [p for p in files if _of_split(p, path, _TRAIN)]
    if train and any(_of_split(p, path, _HELD_OUT) for p in files):
        reading.said(f"{argument}: {path}: only its files of the split train are read")
        files = train
    return Found(_of_files(files, str(path), reading), True, str(path))


def _is_data(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    about = path.stem.lower().startswith(_ABOUT)
    return not hidden and not about and (ending(path) in TEXT_FILES or has_rows(path))


def _of_split(path: Path, root: Path, names: frozenset[str]) -> bool:
    """Whether a file's path says that it belongs to a split of one of these names."""
    words = re.split(r"[^a-z]+", str(path.relative_to(root)).lower())
    return not names.isdisjoint(words)


def _of_files(files: Sequence[Path], name: str, reading: Reading) -> Iterator[Document]:
    """The documents of files of one kind."""
    argument = reading.argument
    if has_rows(files[0]):
        rows = (
            Row(row.place if len(files) == 1 else f"{file.name}, {row.place}", row.value)
            for file in files
            for row in read_rows(file, argument)
        )
        return documents(rows, name, reading)
    texts = (read_text(file, argument) for file in files)
    return (Text(text) for text in texts if text.strip())


def _mapping(source: Mapping[str, Any], reading: Reading) -> Iterator[Row]:
    """The rows of a mapping of columns, or of what a tokenizer returns."""
    if "input_ids" in source:
        return iter([Row("input_ids", source)])
    return rows_of(source, reading.argument)


def _of_list(source: list[Any], reading: Reading) -> Tensor | Found:
    argument = reading.argument
    if not source:
        raise ValueError(f"{argument}: got an empty list, expected some data")
    if all(isinstance(entry, str | Path) for entry in source):
        paths = [existing(entry) for entry in source]
        if any(path is not None for path in paths) or any(map(_is_path, source)):
            return _of_paths(source, paths, reading)
        return Found(documents(_items(source), "the list", reading), True, "the list")
    if all(isinstance(entry, int) and not isinstance(entry, bool) for entry in source):
        return torch.tensor(source, dtype=torch.int64)
    if is_turns(source):
        source = [source]
    return Found(documents(_items(source), "the list", reading), True)


def _is_path(entry: str | Path) -> bool:
    if isinstance(entry, Path) or _is_missing(entry):
        return True
    return "/" in entry and is_dataset_name(entry)


def _of_paths(
    source: Sequence[str | Path], paths: Sequence[Path | None], reading: Reading
) -> Tensor | Found:
    argument = reading.argument
    for entry, path in zip(source, paths, strict=True):
        if path is None:
            shown = str(entry)[:60]
            raise ValueError(
                f"{argument}: got {shown!r}, expected the path of a text file, or of rows, in each "
                "entry of the list (or texts in all of them; a dataset is named alone)"
            )
    found = [_of_path(path, reading) for path in paths if path is not None]
    tensors = [entry for entry in found if isinstance(entry, Tensor)]
    if not tensors:
        held = (entry.documents for entry in found if not isinstance(entry, Tensor))
        return Found(chain.from_iterable(held), True)
    shapes = {tuple(tensor.shape[1:]) for tensor in tensors}
    if len(tensors) < len(found) or len(shapes) > 1:
        what = "tokens and text" if len(tensors) < len(found) else "windows of different widths"
        raise ValueError(f"{argument}: got a list of files with {what}, expected one kind")
    return torch.cat(tensors)


def _items(source: Iterable[Any]) -> Iterator[Row]:
    for number, value in enumerate(source, 1):
        yield Row(f"entry {number}", value)


def _tensor_file(path: Path, argument: str) -> Tensor:
    if path.suffix.lower() not in TOKEN_FILES:
        raise ValueError(f"{argument}: got {path}, expected the tensor itself: unpack it")
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
