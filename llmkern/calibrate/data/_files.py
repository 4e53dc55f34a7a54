"""Files of text and of rows: the end of a file's name says what it holds.

    .jsonl .ndjson .jsonlines   a value of JSON per line
    .json                       a list of rows, columns as lists, an object with one list; or such lines
    .csv .tsv                   a first row of names, then rows
    .parquet .arrow             tables, by pyarrow
    .pt .pth .safetensors       a tensor of tokens
    any other                   UTF-8 text

Text and rows may be compressed: .gz, .bz2, .xz, and .zst where Python or zstandard reads it.
"""

from __future__ import annotations

import csv
import importlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, NamedTuple, TextIO

TOKEN_FILES = (".pt", ".pth", ".safetensors")
TEXT_FILES = (".txt", ".text", ".md", ".rst")
_PACKED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "zstandard"}
_DELIMITERS = {".csv": ",;\t|", ".tsv": "\t"}
# Rows of a table that are made Python objects at a time.
_BATCH = 256
_LONGEST_CELL = 2**31 - 1  # csv refuses cells of more than 128 KiB otherwise
_NAME_WORDS = 6  # a column's name has fewer


class Row(NamedTuple):
    """One entry of a source.

    Attributes:
        place: "line 3", for messages.
        value: a mapping of fields, or a text, turns or tokens.
    """

    place: str
    value: Any


def ending(path: Path) -> str:
    """What a file's name ends in, without that of its compression: ".jsonl" of "a.jsonl.gz"."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _PACKED else suffix


def is_known(path: Path) -> bool:
    """Whether a name ends as files of data do."""
    known = (*TOKEN_FILES, *TEXT_FILES, *_READERS, *_TABLES)
    return ending(path) in known or path.suffix.lower() in _PACKED


def has_rows(path: Path) -> bool:
    """Whether a file holds rows with fields."""
    return ending(path) in (*_READERS, *_TABLES)


def read_text(path: Path, argument: str) -> str:
    """A file of UTF-8 text, without a byte order mark and with plain line ends.

    Raises:
        ValueError: it cannot be read, or is no text.
    """
    with _opened(path, argument) as file:
        text = file.read()
    if "\0" in text:
        raise ValueError(f"{argument}: got {path}, expected UTF-8 text, not binary data")
    return text


def read_rows(path: Path, argument: str) -> Iterator[Row]:
    """The rows of a file that has some, in order.

    Raises:
        ValueError: it cannot be read, or does not hold what its name says; names the line.
    """
    kind = ending(path)
    if kind in _TABLES:
        yield from _table(path, argument)
        return
    with _opened(path, argument) as file:
        yield from _READERS[kind](file, path, argument)


def json_lines(path: Path, argument: str) -> Iterator[Row]:
    """The value of each line that is not empty, whatever the file's name.

    Raises:
        ValueError: a line that is no JSON.
    """
    with _opened(path, argument) as file:
        yield from _lines(file, path, argument)


def rows_of(value: Any, where: str) -> Iterator[Row]:
    """Rows of what a .json file (or a Python mapping) holds.

    Args:
        value: a list of rows; a mapping with a list per column, or with one list of rows, or a row.
        where: it is from, for messages.

    Raises:
        ValueError: none of these.
    """
    if isinstance(value, Mapping):
        value = _listed(dict(value), where)
    if not isinstance(value, list):
        raise ValueError(f"{where}: got {type(value).__name__}, expected a list of objects")
    if is_turns(value):
        value = [value]
    for number, row in enumerate(value, 1):
        yield Row(f"row {number}", row)


def is_turns(value: Any) -> bool:
    """Whether a value is a conversation: turns of role and content (or from and value)."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, Mapping) for turn in value)
        and all(("role" in turn and "content" in turn) or "from" in turn for turn in value)
    )


def _listed(value: dict[str, Any], where: str) -> list[Any]:
    lists = {name: column for name, column in value.items() if isinstance(column, list)}
    rows = [n for n, c in lists.items() if c and isinstance(c[0], Mapping) and not is_turns(c)]
    if len(rows) == 1 and len(lists) == 1:
        return list(lists[rows[0]])
    if any(is_turns(column) for column in lists.values()) or (value and not lists):
        if value and all(isinstance(column, Mapping) for column in value.values()):
            names = ", ".join(map(str, list(value)[:5]))
            raise ValueError(
                f"{where}: got an object of objects ({names}), expected a list of them"
            )
        return [value]
    lengths = {len(column) for column in lists.values()}
    if value and len(lists) == len(value) and len(lengths) == 1 and not rows:
        return [dict(zip(lists, cells, strict=True)) for cells in zip(*lists.values(), strict=True)]
    names = ", ".join(f"{n} of {len(c)}" for n, c in lists.items()) or "none"
    raise ValueError(
        f"{where}: got an object with the lists {names}, expected a list of objects, columns of one "
        "length, or one list of objects"
    )


@contextmanager
def _opened(path: Path, argument: str) -> Iterator[TextIO]:
    """A text file, perhaps compressed; what goes wrong while it is read is one line."""
    try:
        with _unpacked(path, argument) as raw:
            yield TextIOWrapper(raw, encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{argument}: got {path}, expected UTF-8 text ({_coded(error)})"
        ) from error
    except _damages() as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{argument}: got {path}, which cannot be read ({reason})") from error


def _unpacked(path: Path, argument: str) -> IO[bytes]:
    packed = _PACKED.get(path.suffix.lower())
    if packed is None:
        return path.open("rb")
    for name in ("compression.zstd", packed) if packed == "zstandard" else (packed,):
        try:
            opened: IO[bytes] = importlib.import_module(name).open(path, "rb")
            return opened
        except ImportError:
            continue
    raise ValueError(
        f"{argument}: got {path}, which needs the package zstandard (pip install zstandard), expected "
        "another compression or none"
    )


def _damages() -> tuple[type[Exception], ...]:
    """What readers of files raise."""
    found: list[type[Exception]] = [OSError, EOFError, zlib.error]
    for module, name in (("lzma", "LZMAError"), ("zstandard", "ZstdError")):
        try:
            found.append(getattr(importlib.import_module(module), name))
        except ImportError:
            continue
    return tuple(found)


def _coded(error: UnicodeDecodeError) -> str:
    if error.object[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "it begins like UTF-16: iconv -f UTF-16 -t UTF-8 rewrites it"
    byte = error.object[error.start]
    return f"{error.reason}: 0x{byte:02x}; if it is Latin-1, iconv -f LATIN1 -t UTF-8 rewrites it"


def _lines(file: TextIO, path: Path, argument: str) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                where = f"{argument}: {path}, line {number}"
                raise ValueError(f"{where}: got no JSON ({error}), expected an object") from error
            yield Row(f"line {number}", value)


def _json(file: TextIO, path: Path, argument: str) -> Iterator[Row]:
    text = file.read()
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        if not str(error).startswith("Extra data"):
            raise ValueError(f"{argument}: got {path}, expected JSON ({error})") from error
        # Some write an object a line under this name.
        yield from _lines(iter(text.split("\n")), path, argument)  # type: ignore[arg-type]
        return
    yield from rows_of(value, f"{argument}: {path}")


def _csv(file: TextIO, path: Path, argument: str) -> Iterator[Row]:
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        yield from _cells(file, path, argument)
    except csv.Error as error:
        raise ValueError(f"{argument}: got {path}, which cannot be read ({error})") from error
    finally:
        csv.field_size_limit(before)


def _cells(file: TextIO, path: Path, argument: str) -> Iterator[Row]:
    first = next((line for line in file if line.strip()), "")
    offered = _DELIMITERS[ending(path)]
    delimiter = max(offered, key=first.count)  # the first of them where none is there

    def lines() -> Iterator[str]:
        yield first
        yield from file

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    names = next(reader, [])
    odd = [n for n in names if len(n.split()) >= _NAME_WORDS]
    if odd or len(set(names)) < len(names):
        got = f"{odd[0][:40]!r} in the first row" if odd else f"the names {', '.join(names)}"
        raise ValueError(
            f"{argument}: {path}: got {got}, expected a first row that names the columns"
        )
    for cells in reader:
        if not cells:
            continue
        if len(cells) != len(names):
            raise ValueError(
                f"{argument}: {path}, line {reader.line_num}: got {len(cells)} cells, expected "
                f"{len(names)} as in the first row (a cell that holds {delimiter!r} stands in quotes)"
            )
        yield Row(f"line {reader.line_num}", dict(zip(names, cells, strict=True)))


def _table(path: Path, argument: str) -> Iterator[Row]:
    if path.suffix.lower() in _PACKED:
        raise ValueError(f"{argument}: got {path}, expected the table itself: unpack it")
    try:
        pyarrow = importlib.import_module("pyarrow")
        ipc, parquet = (importlib.import_module(f"pyarrow.{n}") for n in ("ipc", "parquet"))
    except ImportError as error:
        raise ValueError(
            f"{argument}: got {path}, which needs the package pyarrow (pip install 'llmkern[datasets]'), "
            "expected it, or the rows as .jsonl"
        ) from error
    number = 0
    try:
        if ending(path) == ".parquet":
            batches = parquet.ParquetFile(path).iter_batches(batch_size=_BATCH)
        else:
            batches = _arrow(pyarrow, ipc, path)
        for batch in batches:
            for value in batch.to_pylist():
                number += 1
                yield Row(f"row {number}", value)
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{argument}: got {path}, which cannot be read ({reason})") from error


def _arrow(pyarrow: Any, ipc: Any, path: Path) -> Iterator[Any]:
    """The batches of either form of an Arrow file."""
    with pyarrow.memory_map(str(path)) as source:
        try:
            yield from ipc.open_stream(source)
        except pyarrow.ArrowInvalid:
            source.seek(0)
            table = ipc.open_file(source)
            yield from (table.get_batch(i) for i in range(table.num_record_batches))


_TABLES = (".parquet", ".arrow")
_READERS: dict[str, Callable[[TextIO, Path, str], Iterator[Row]]] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines"), _lines),
    **dict.fromkeys(_DELIMITERS, _csv),
    ".json": _json,
}
