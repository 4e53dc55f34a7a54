"""Rows of files, datasets and Python objects: what is read of them, what is left out, what is refused."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from llmkern.calibrate import load_tokens, load_windows

WIDTH = 8
PROSE = [f"the quick brown fox number {i} jumps over the lazy dog" for i in range(6)]
JOINED = "\n\n".join(PROSE)
# A text is the longest prose among what must never be taken for it.
ROWS = [
    {
        "id": f"{i:032x}",
        "url": f"https://example.org/pages/about/the/fox/{i}",
        "sha": "Zm94IGp1bXBzIG92ZXIgdGhlIGxhenkgZG9n" * 9 + str(i),
        "category": "international championships, qualifications and intercontinental tournaments",
        "date": f"2024-01-0{i + 1} 10:00:00 + 00:00 12 12 12 12 12 12 12 12 12 12 12 12 12 12 12 12 12",
        "title": f"about fox number {i}",
        "body": text,
        "votes": i,
    }
    for i, text in enumerate(PROSE)
]
TURNS = [{"role": "user", "content": "who is it"}, {"role": "assistant", "content": "a fox"}]
SHAREGPT = [{"from": "human", "value": "who is it"}, {"from": "gpt", "value": "a fox"}]


class Model(nn.Module):
    """As much of a model as data are checked against."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(300, 4)
        self.config = SimpleNamespace(max_position_embeddings=64)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding


class Bytes:
    """A tokenizer of bytes with a chat template."""

    chat_template: str | None = "yes"

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def apply_chat_template(self, turns: list[dict[str, str]], **options: Any) -> str:
        if turns[0]["role"] == "assistant":
            raise RuntimeError("roles must\nalternate")
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in turns)


MODEL, TOKENIZER = Model(), Bytes()


def read(source: Any, said: list[str] | None = None, **options: Any) -> str:
    """The text that comes out of a source, but for what is less than a window at its end."""
    tell = (said if said is not None else []).append
    options = {"tokenizer": TOKENIZER, **options}
    windows = load_tokens(source, MODEL, seq_len=WIDTH, said=tell, **options)
    return bytes(windows.flatten().tolist()).decode()


def whole(text: str) -> str:
    """What of a text fills windows."""
    return text[: len(text) // WIDTH * WIDTH]


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    class File(list[str]):
        write = list.append

    file = File()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return "".join(file)


COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
FILES: dict[str, str | bytes] = {
    "rows.jsonl": lines(ROWS),
    "upper.JSONL": lines(ROWS),
    "rows.ndjson": lines(ROWS),
    "blank_lines.jsonl": lines(ROWS).replace("\n", "\n\n"),
    "crlf.jsonl": lines(ROWS).replace("\n", "\r\n"),
    "no_last_newline.jsonl": lines(ROWS).strip(),
    "marked.jsonl": b"\xef\xbb\xbf" + lines(ROWS).encode(),
    "list.json": json.dumps(ROWS, indent=1),
    "columns.json": json.dumps(COLUMNS),
    "one_list.json": json.dumps({"version": "1", "data": ROWS}),
    "lines.json": lines(ROWS),
    "texts.json": json.dumps(PROSE),
    "texts.jsonl": lines(PROSE),
    "rows.csv": table(ROWS),
    "semicolons.csv": table(ROWS, ";"),
    "crlf.csv": table(ROWS).replace("\n", "\r\n").encode(),
    "marked.csv": b"\xef\xbb\xbf" + table(ROWS).encode(),
    "rows.tsv": table(ROWS, "\t"),
    "rows.jsonl.gz": gzip.compress(lines(ROWS).encode()),
    "rows.csv.bz2": bz2.compress(table(ROWS).encode()),
    "rows.json.xz": lzma.compress(json.dumps(ROWS).encode()),
    "text.txt.gz": gzip.compress(JOINED.encode()),
    "text.txt": JOINED,
    "text.md": JOINED,
    "no_suffix": JOINED,
    "marked.txt": b"\xef\xbb\xbf" + JOINED.encode(),
    "crlf.txt": JOINED.replace("\n", "\r\n").encode(),
}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", FILES)
def test_every_file_gives_its_texts(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, FILES[name])
    said: list[str] = []
    assert read(path, said) == whole(JOINED)
    assert read(str(path)) == whole(JOINED)
    has_columns = not name.startswith(("text", "no_", "marked.txt", "crlf.txt"))
    want = [f"data: {path}: column body is read"]
    assert said == (want if has_columns or "newline" in name else [])


def test_text_goes_before_longer_prose(tmp_path: Path) -> None:
    rows = [{"text": text, "about": text * 3} for text in PROSE]
    assert read(write(tmp_path / "a.jsonl", lines(rows))) == whole(JOINED)


@pytest.mark.parametrize(
    ("field", "rows"),
    [
        ("body", ROWS),
        ("a.b", [{"a": {"b": text}, "text": "no"} for text in PROSE]),
        ("a.b", [{"a.b": text, "a": {"b": "no"}} for text in PROSE]),
        ("a.b.c", [{"a.b": {"c": text}} for text in PROSE]),
        ("parts", [{"parts": PROSE[:2]}, {"parts": PROSE[2:]}]),
    ],
    ids=["named", "nested", "dot_in_the_name", "dot_in_an_outer_name", "lists"],
)
def test_field_is_taken_by_name(tmp_path: Path, field: str, rows: list[Any]) -> None:
    path = write(tmp_path / "a.jsonl", lines(rows))
    said: list[str] = []
    assert read(path, said, text_field=field) == whole(JOINED)
    assert said == [f"data: {path}: column {field} is read"]
    windows = load_windows(path, MODEL, TOKENIZER, seq_len=WIDTH, samples=3, text_field=field)
    assert windows.shape == (3, WIDTH)


def test_prose_inside_of_objects_and_of_other_scripts_is_found() -> None:
    assert read([{"id": i, "a": {"b": text}} for i, text in enumerate(PROSE)]) == whole(JOINED)
    rows = [{"id": f"x{i}", "内容": f"敏捷的棕色狐狸跳过了懒狗第{i}次"} for i in range(9)]
    said: list[str] = []
    windows = load_tokens(rows, MODEL, TOKENIZER, seq_len=WIDTH, said=said.append)
    assert said == ["data: the list: column 内容 is read"]
    assert "狐狸" in bytes(windows.flatten().tolist()).decode(errors="replace")


CHATS = {
    "messages": [{"id": "x", "messages": TURNS}] * 3,
    "sharegpt": [{"conversations": SHAREGPT}] * 3,
    "pairs": [{"prompt": "who is it", "completion": "a fox"}] * 3,
    "pairs_of_turns": [{"prompt": TURNS[:1], "completion": TURNS[1:]}] * 3,
    "instructions": [{"instruction": "who is it", "input": "", "output": "a fox"}] * 3,
    "turns_in_parts": [
        {"messages": [{**t, "content": [{"type": "text", "text": t["content"]}]} for t in TURNS]}
    ]
    * 3,
    "bare_turns": [TURNS] * 3,
    "columns_of_turns": [
        {"messages": {key: [turn[key] for turn in TURNS] for key in ("role", "content")}}
    ]
    * 3,
    "other_name": [{"chosen": TURNS, "n": 1}] * 3,
}


@pytest.mark.parametrize("name", CHATS)
def test_conversations_go_through_the_chat_template(tmp_path: Path, name: str) -> None:
    rows = CHATS[name]
    want = whole("<user>who is it<assistant>a fox" * 3)
    said: list[str] = []
    assert read(rows, said) == want
    assert read(write(tmp_path / "a.jsonl", lines(rows)), said) == want
    if name not in ("other_name", "bare_turns"):
        assert said[-1].endswith("(conversations, in the tokenizer's chat template) is read")
    plain = Bytes()
    plain.chat_template = None
    with pytest.raises(
        ValueError, match=r"got conversations \(.*expected a tokenizer with a chat te"
    ):
        read(rows, tokenizer=plain)
    with pytest.raises(ValueError, match="tokenizer: got None"):
        read(rows, tokenizer=None)


def test_every_part_of_a_conversation_is_in_it() -> None:
    rows = [{"system": "be kind", "instruction": "sum", "input": "1 2", "output": "three is it"}]
    assert read(rows) == whole("<system>be kind<user>sum\n1 2<assistant>three is it")
    rows = [{"instruction": "sum", "input": None, "output": "x"}, rows[0]]
    assert "sum\n1 2" in read(rows)  # though the first row has none
    assert read(TURNS) == whole(
        "<user>who is it<assistant>a fox"
    )  # a list that is one conversation
    assert read({"messages": TURNS}) == whole("<user>who is it<assistant>a fox")


def test_rows_that_are_left_out_are_counted() -> None:
    rows = [
        {"text": None},
        *({"text": t} for t in PROSE),
        {"text": " \n"},
        {},
        {"text": float("nan")},
    ]
    said: list[str] = []
    assert read(rows, said) == whole(JOINED)
    assert said[1:] == ["data: the list: 4 of 10 rows are empty and left out"]
    odd = [{"messages": TURNS}, {"messages": TURNS[1:]}, {"messages": []}]
    said.clear()
    assert read(odd, said) == whole("<user>who is it<assistant>a fox")
    assert said[1:] == [
        "data: the list: 1 of 3 rows are empty and left out",
        "data: the list: 1 of 3 rows are left out, because the tokenizer's chat template refuses them "
        "(entry 2: roles must alternate)",
    ]


def test_texts_begin_after_many_empty_rows() -> None:
    rows = [{"text": "", "n": 1}] * 200 + [{"text": text, "n": 1} for text in PROSE]
    assert read(rows) == whole(JOINED)


def generated() -> Iterator[dict[str, Any]]:
    yield from ROWS


class Frame:
    """A table of a package such as pandas: to iterate over it gives names of columns."""

    columns = tuple(COLUMNS)

    def __iter__(self) -> Iterator[str]:
        return iter(COLUMNS)

    def to_dict(self, orient: str) -> Any:
        return ROWS if orient == "records" else COLUMNS


def batches(rows: Any) -> Any:
    return DataLoader(rows, batch_size=4)


OBJECTS: dict[str, Callable[[], Any]] = {
    "texts": lambda: PROSE,
    "tuple_of_texts": lambda: tuple(PROSE),
    "one_word_texts": lambda: JOINED.replace("\n\n", " ").split(" "),
    "rows": lambda: ROWS,
    "columns": lambda: COLUMNS,
    "rows_and_texts": lambda: [{"text": PROSE[0]}, *PROSE[1:]],
    "frame": Frame,
    "generator_of_texts": lambda: (text for text in PROSE),
    "generator_of_rows": generated,
    "loader_of_texts": lambda: batches(PROSE),
    "loader_of_rows": lambda: batches([{"text": text} for text in PROSE]),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_of_python_are_read(name: str) -> None:
    want = JOINED if name != "one_word_texts" else JOINED.replace(" ", "\n\n")
    assert read(OBJECTS[name]()) == whole(want)


WINDOWS = torch.arange(3 * WIDTH).view(3, WIDTH)
RAGGED = [[1] * 10, [2] * 6, [3] * 16]
TOKENS: dict[str, tuple[Any, Any]] = {
    "rows_of_one_length": (WINDOWS.tolist(), WINDOWS),
    "tensors": (list(WINDOWS), WINDOWS),
    "array": (WINDOWS.numpy(), WINDOWS),
    "array_of_16_bits": (WINDOWS.numpy().astype("uint16"), WINDOWS),
    "encoding": ({"input_ids": WINDOWS, "attention_mask": torch.ones_like(WINDOWS)}, WINDOWS),
    "encoding_of_lists": ({"input_ids": WINDOWS.tolist()}, WINDOWS),
    "tokenized_rows": ([{"input_ids": r, "text": "x"} for r in WINDOWS.tolist()], WINDOWS),
    "arrays_in_rows": ([{"input_ids": np.array(r)} for r in WINDOWS.tolist()], WINDOWS),
    "pairs": ([(r[None], r[None]) for r in WINDOWS], WINDOWS),
    "loader": (DataLoader(WINDOWS, batch_size=2), WINDOWS),
    "one_stream": (list(range(3 * WIDTH)), WINDOWS),
    "one_long_row": ({"input_ids": WINDOWS.view(1, -1)}, WINDOWS),
    "ragged": (RAGGED, torch.tensor([t for row in RAGGED for t in row]).view(4, WIDTH)),
    "padded": (
        {
            "input_ids": torch.tensor([[7] * 12, [8] * 12]),
            "attention_mask": torch.tensor([[1] * 12, [1] * 4 + [0] * 8]),
        },
        torch.tensor([7] * 12 + [8] * 4).view(2, WIDTH),
    ),
}


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_are_taken_as_they_are(name: str) -> None:
    source, want = TOKENS[name]
    assert torch.equal(load_tokens(source, MODEL, seq_len=WIDTH), want)


def test_directory_of_files_is_one_source(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    write(folder / "a.txt", PROSE[0])
    write(folder / "deep" / "b.txt.gz", gzip.compress(PROSE[1].encode()))
    for ignored in ("README.md", ".hidden.txt", "picture.png"):
        write(folder / ignored, "no")
    assert read(folder) == whole("\n\n".join(PROSE[:2]))
    rows = tmp_path / "rows"
    rows.mkdir()
    for i in range(3):
        write(rows / f"train-{i}.jsonl", lines(ROWS[2 * i : 2 * i + 2]))
    assert read(rows) == whole(JOINED)
    write(rows / "test-0.jsonl", lines([{"body": "not to be read, as it is held out"}] * 5))
    said: list[str] = []
    assert read(rows, said) == whole(JOINED)
    assert said[0] == f"data: {rows}: only its files of the split train are read"


def test_list_may_mix_kinds_of_files(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "a.jsonl", lines(ROWS[:2])),
        write(tmp_path / "b.txt", PROSE[2]),
        write(tmp_path / "c.csv", table([{"n": 1, "text": PROSE[3]}])),
    ]
    said: list[str] = []
    assert read([str(paths[0]), *paths[1:]], said) == whole("\n\n".join(PROSE[:4]))
    assert [line.split(": column ")[1] for line in said] == ["body is read", "text is read"]


def test_only_what_is_needed_is_read_of_an_iterable() -> None:
    read_on: list[int] = []

    def endless() -> Iterator[str]:
        i = 0
        while True:
            read_on.append(i)
            yield PROSE[i % 6]
            i += 1

    said: list[str] = []
    options: dict[str, Any] = {"seq_len": WIDTH, "samples": 5, "said": said.append}
    first = load_windows(endless(), MODEL, TOKENIZER, **options)
    assert first.shape == (5, WIDTH)
    assert len(read_on) < 100
    assert torch.equal(first, load_windows(endless(), MODEL, TOKENIZER, **options))
    assert said[0].endswith("tokens are read, which is enough")
    assert len(load_tokens(endless(), MODEL, TOKENIZER, seq_len=WIDTH)) >= 4096


def test_one_huge_line_is_read(tmp_path: Path) -> None:
    text = " ".join(PROSE * 2000)
    for name, content in (("a.txt", text), ("a.jsonl", lines([{"text": text}]))):
        assert read(write(tmp_path / name, content)) == whole(text)
    path = write(tmp_path / "a.csv", table([{"text": text}]))  # csv allows 128 KiB by default
    assert read(path) == whole(text)


BAD_FILES: dict[str, tuple[str | bytes, str]] = {
    "empty.txt": ("", "got no text in .*empty.txt, expected some"),
    "empty.jsonl": ("\n", "got no rows in .*empty.jsonl"),
    "empty.json": ("", "got no rows in"),
    "empty_list.json": ("[]", "got no rows in"),
    "empty.csv": ("", "got no rows in"),
    "only_names.csv": ("id,text\n", "got no rows in"),
    "empty.txt.gz": (gzip.compress(b""), "got no text in"),
    "only_none.jsonl": ('{"text": null}\n', "got no text in"),
    "broken.jsonl": ('{"text": "a b"}\n{"text": \n', "line 2: got no JSON"),
    "broken.json": ("[1, 2", "expected JSON"),
    "number.json": ("5", "got int, expected a list of objects"),
    "objects.json": ('{"a": {"text": "x"}, "b": {"text": "y"}}', r"an object of objects \(a, b\)"),
    "splits.json": (
        '{"train": [{"text": "a"}], "test": [{"text": "b"}]}',
        "the lists train of 1, test",
    ),
    "uneven.json": (
        '{"text": ["a", "b"], "id": [1]}',
        "the lists text of 2, id of 1, expected a list",
    ),
    "numbers.jsonl": (lines([{"text": 5, "n": 1}]), "got columns text, n in .*none holds prose"),
    "mixed.jsonl": (
        lines([{"text": "a b"}, {"text": 5}]),
        "line 2: text: got int '5', expected a text",
    ),
    "ids.jsonl": (
        lines([{"id": f"{i:032x}", "u": "http://a.b/c d e f"} for i in range(9)]),
        "id, u in",
    ),
    "bad_turn.jsonl": (
        lines([{"conversations": [{"from": "elf", "value": "a"}]}]),
        "from 'elf', expect",
    ),
    "picture.jsonl": (
        lines([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}]),
        "messages: got a turn that holds image, expected text",
    ),
    "two_chats.jsonl": (
        lines([{"chosen": TURNS, "rejected": TURNS}]),
        "chosen, rejected in .*several hold conversations",
    ),
    "all_refused.jsonl": (lines([{"messages": TURNS[1:]}]), "template refuses, expected others"),
    "no_names.csv": ("\n".join(PROSE), "expected a first row that names the columns"),
    "unquoted.csv": ("text\nwell, then\n", "line 2: got 2 cells, expected 1"),
    "open_quote.csv": ('text\n"well\n', "cannot be read"),
    "latin1.txt": ("café au lait".encode("latin1"), "expected UTF-8 text .*0xe9; if it is Latin-1"),
    "latin1.csv": ("text\ncafé au lait".encode("latin1"), "if it is Latin-1"),
    "utf16.txt": (JOINED.encode("utf-16"), "begins like UTF-16"),
    "binary.txt": (b"a\0b" * 9, "not binary data"),
    "no_gzip.txt.gz": (b"nonsense", "cannot be read"),
    "cut.txt.gz": (gzip.compress(JOINED.encode())[:40], "cannot be read"),
    "no_xz.txt.xz": (b"nonsense", "cannot be read"),
    "tokens.pt.gz": (b"", "unpack it"),
    "rows.parquet.gz": (b"", "unpack it"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    with pytest.raises(ValueError, match=message) as caught:
        read(write(tmp_path / name, content))
    text = str(caught.value)
    assert text.startswith("data: ")
    assert "\n" not in text
    assert name in text


BAD_OBJECTS: dict[str, tuple[Any, str]] = {
    "empty_list": ([], "got an empty list"),
    "empty_mapping": ({}, "got no rows|got an object"),
    "blank_texts": (["", " "], "got no text in the list"),
    "bytes": (b"a b c d e", "got bytes, expected text"),
    "array_of_floats": (np.ones((2, 8)), r"got float64 \[2, 8\], expected int64"),
    "array_of_one_number": (np.array(5), r"got int64 \[\], expected int64"),
    "number": (5, "got int, expected text"),
    "objects": (
        [object()],
        "entry 1: got object, expected an object with fields, a text, or tokens",
    ),
    "floats": ([[0.5, 1.5]], "input_ids: got list .*, expected a text"),
    "text_and_tokens": (["a b", [1, 2]], "input_ids is expected, as in other entries, got text"),
    "tokens_in_rows": ([{"input_ids": [1] * 9}, {"input_ids": "a"}], "got texts and tokens mixed"),
    "set": ({"a b", "c d"}, "got a set, expected a list: a set has no order"),
    "file": (io.StringIO("a b"), "got a StringIO, expected its path"),
    "mask_of_less": ({"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1]]}, "a text or tokens"),
    "path_and_text": ([__file__, "a b c"], "got 'a b c', expected the path of a text file"),
    "missing_path": ([__file__, "no/such.jsonl"], "got 'no/such.jsonl', expected the path"),
    "dataset_in_a_list": (["owner/name"], "got 'owner/name', .*a dataset is named alone"),
    "missing_drive": ("C:\\texts\\all", "expected an existing file"),
    "missing_deep": ("some/folder/of/texts", "expected an existing file"),
    "missing_rows": ("no_such.csv.gz", "expected an existing file"),
    "missing_with_spaces": ("my data/all of it.jsonl", "expected an existing file"),
    "missing_folder": ("./no_such_folder", "expected an existing file"),
    "missing_home": ("~/no_such_folder", "expected an existing file"),
    "address": ("https://example.org/a", "expected an existing file"),
    "missing_object": (Path("owner/name"), "expected an existing file"),
}


@pytest.mark.parametrize("name", BAD_OBJECTS)
def test_bad_objects_are_refused_in_one_line(name: str) -> None:
    source, message = BAD_OBJECTS[name]
    with pytest.raises(ValueError, match=message) as caught:
        read(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "with no text and no rows in it"),
        ({"a.txt": "a b", "b.jsonl": "{}"}, r"with files of \.jsonl, \.txt, expected text or rows"),
        ({"config.json": "{}", "a.txt": "a b"}, "which holds a model, expected data"),
    ],
    ids=["empty", "mixed", "model"],
)
def test_bad_directories_are_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([{"body": "a b", "n": 1}], "text_field: got 'x', expected one of body, n of the list"),
        (JOINED, "text_field: got 'x', expected None: data has no rows with fields"),
        (PROSE, "text_field: got 'x', expected None: the list has no fields"),
        (None, "text_field: got 'x', expected None"),
        (WINDOWS, "text_field: got 'x', expected None"),
    ],
    ids=["other_fields", "text", "texts", "builtin", "tokens"],
)
def test_field_that_is_not_there_is_refused(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(source, text_field="x")


def fake_datasets(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    module = ModuleType("datasets")
    for name, function in functions.items():
        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "datasets", module)


class Stream:
    """A dataset that tells neither its columns nor its length."""

    column_names = features = None

    def __init__(self, rows: list[dict[str, Any]], broken: bool = False) -> None:
        self.rows, self.broken = rows, broken

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from self.rows
        if self.broken:
            raise OSError("connection\nlost")


def test_datasets_are_streamed_from_their_first_row(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    rows = [{"id": f"{i}", "body": text + f" and {i}"} for i in range(200) for text in PROSE]

    def load_dataset(*names: str, **options: Any) -> Stream:
        asked.append((names, options))
        return Stream(rows, broken=True)

    fake_datasets(monkeypatch, load_dataset=load_dataset)
    said: list[str] = []
    windows = load_windows(
        "owner/name:small", MODEL, TOKENIZER, seq_len=WIDTH, samples=4, said=said.append
    )
    assert asked == [(("owner/name", "small"), {"split": "train", "streaming": True})]
    begin = "\n\n".join(row["body"] for row in rows[:2])
    assert all(bytes(window).decode() in begin for window in windows.tolist())
    assert said[0] == "calibration: owner/name:small: column body is read"


def test_text_without_spaces_is_no_name_of_a_dataset() -> None:
    text = "敏捷的棕色狐狸跳过了懒狗。" * 9
    windows = load_tokens(text, MODEL, TOKENIZER, seq_len=WIDTH)
    assert bytes(windows.flatten().tolist()) == text.encode()[: windows.numel()]


@pytest.mark.parametrize("name", ["text", "json", "csv::train"])
def test_name_of_a_reader_is_no_dataset(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # The package would read whatever lies in the working directory.
    fake_datasets(monkeypatch, load_dataset=lambda *names, **options: Stream(ROWS))
    with pytest.raises(ValueError, match="a kind of files, expected their path"):
        read(name)


def test_datasets_given_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Stream(ROWS)
    said: list[str] = []
    assert read(data, said) == whole(JOINED)
    assert said == ["data: the Stream: column body is read"]
    assert read({"train": data, "test": Stream([])}) == whole(JOINED)
    assert read({"only": data}) == whole(JOINED)
    with pytest.raises(ValueError, match="got the splits a, b, expected one of them"):
        read({"a": data, "b": data})
    with pytest.raises(ValueError, match="got 'the Stream', which cannot be read: connection lost"):
        read(Stream(ROWS, broken=True))


def test_saved_datasets_go_through_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "dataset_dict.json", '{"splits": ["train"]}')
    fake_datasets(monkeypatch, load_from_disk=lambda path: {"train": Stream(ROWS)})
    assert read(tmp_path) == whole(JOINED)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ValueError, match=r"which holds a dataset; it needs the package datasets \(pip"
    ):
        read(tmp_path)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_tables_without_their_package_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"needs the package pyarrow .*, or the rows as \.jsonl"):
        read(write(tmp_path / name, b"PAR1"))


def test_tables_are_read_by_their_package(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet, ipc = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow.ipc")
    made = pyarrow.Table.from_pylist(ROWS)
    parquet.write_table(made, tmp_path / "a.parquet")
    with ipc.new_stream(str(tmp_path / "stream.arrow"), made.schema) as writer:
        writer.write_table(made)
    with ipc.new_file(str(tmp_path / "file.arrow"), made.schema) as writer:
        writer.write_table(made)
    for name in ("a.parquet", "stream.arrow", "file.arrow"):
        assert read(tmp_path / name) == whole(JOINED)
    with pytest.raises(ValueError, match="which cannot be read"):
        read(write(tmp_path / "bad.parquet", b"PAR1 nonsense"))
