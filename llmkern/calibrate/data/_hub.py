"""Datasets of Hugging Face: by name, as directories of `save_to_disk`, or as objects."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmkern.calibrate.data._files import Row, is_known

_SAVED = ("state.json", "dataset_dict.json")
# What the package reads files by; asked for one of these it would take whatever lies around.
_BUILDERS = {"text", "json", "csv", "parquet", "arrow", "pandas", "xml", "sql", "webdataset"}
_BUILDERS |= {"imagefolder", "audiofolder", "videofolder", "pdffolder"}
_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?(:[^\s:/\\]*)?(:[^\s/\\]*)?", re.ASCII)


def is_dataset_name(text: str) -> bool:
    """Whether a text may be NAME, NAME:CONFIG or NAME:CONFIG:SPLIT of a dataset, by its form."""
    return _NAME.fullmatch(text) is not None and not is_known(Path(text))


def is_saved(directory: Path) -> bool:
    """Whether `save_to_disk` has made a directory."""
    return any((directory / name).is_file() for name in _SAVED)


def is_dataset(value: Any) -> bool:
    """Whether a value is a dataset of the package, of either kind."""
    return hasattr(value, "column_names") and hasattr(value, "features")


def is_splits(value: Any) -> bool:
    """Whether a value is a mapping of such datasets."""
    return isinstance(value, Mapping) and bool(value) and all(map(is_dataset, value.values()))


def hub_rows(name: str, argument: str) -> Iterator[Row]:
    """The rows of a dataset by its name, of which no more is downloaded than is read.

    Raises:
        ValueError: the package is missing, or says that there is no such dataset, config or split.
    """
    datasets = _package(f"{argument}: got {name!r}, which is no file; a dataset of that name")
    path, config, split = [*name.split(":", 2), "", ""][:3]
    if path in _BUILDERS:
        raise ValueError(f"{argument}: got {name!r}, a kind of files, expected their path")
    with _in_one_line(name, argument):
        rows = datasets.load_dataset(path, config or None, split=split or "train", streaming=True)
    yield from dataset_rows(rows, name, argument)


def saved_rows(directory: Path, argument: str) -> Iterator[Row]:
    """The rows of a directory that `save_to_disk` has made.

    Raises:
        ValueError: the package is missing, or cannot read it; splits of which none is "train".
    """
    datasets = _package(f"{argument}: got {directory}, which holds a dataset; it")
    with _in_one_line(str(directory), argument):
        found = datasets.load_from_disk(str(directory))
    if isinstance(found, Mapping):
        found = one_split(found, f"{argument}: got {directory} with", "DIRECTORY/SPLIT")
    yield from dataset_rows(found, str(directory), argument)


def one_split(splits: Mapping[str, Any], got: str, way: str) -> Any:
    """The split "train", or the only one.

    Raises:
        ValueError: several, none of which is "train".
    """
    if "train" in splits or len(splits) == 1:
        return splits["train"] if "train" in splits else next(iter(splits.values()))
    raise ValueError(f"{got} the splits {', '.join(splits)}, expected one of them: {way}")


def dataset_rows(rows: Any, name: str, argument: str) -> Iterator[Row]:
    """The rows of a dataset, in order.

    Raises:
        ValueError: what goes wrong while they are read, in one line.
    """
    with _in_one_line(name, argument):
        for number, row in enumerate(rows, 1):
            yield Row(f"row {number}", row)


@contextmanager
def _in_one_line(name: str, argument: str) -> Iterator[None]:
    """Whatever the package and the network below it raise, as one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{argument}: got {name!r}, which cannot be read: {reason}") from error


def _package(needed: str) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(
            f"{needed} needs the package datasets (pip install 'llmkern[datasets]')"
        ) from error
