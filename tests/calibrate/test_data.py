"""Windows of tokens from every kind of source, and the errors of bad ones."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from llmkern.calibrate import load_tokens, load_windows

VOCAB, CONTEXT = 300, 40


class Model(nn.Module):
    """As much of a model as data are checked against."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 4)
        self.config = SimpleNamespace(max_position_embeddings=CONTEXT)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding


def byte_tokenizer(text: str, **options: Any) -> dict[str, list[int]]:
    return {"input_ids": list(text.encode())}


@pytest.fixture
def model() -> Model:
    return Model()


TEXT = "The quick brown fox jumps over the lazy dog. " * 20  # 900 tokens


def test_text_and_its_file_give_the_same_tokens(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "text with spaces.txt"
    path.write_text(TEXT)
    want = torch.tensor(list(TEXT.encode()))[: 900 // 8 * 8].view(-1, 8)
    for source in (TEXT, path, str(path), [path]):
        assert torch.equal(load_tokens(source, model, byte_tokenizer, seq_len=8), want)


def test_several_files_are_one_text(model: Model, tmp_path: Path) -> None:
    for name, text in (("a", "abcd"), ("b", "efg")):
        (tmp_path / name).write_text(text)
    tokens = load_tokens([tmp_path / "a", tmp_path / "b"], model, byte_tokenizer, seq_len=8)
    assert bytes(tokens[0].tolist()) == b"abcd\n\nef"


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_token_files_hold_windows(
    model: Model, tmp_path: Path, suffix: str, dtype: torch.dtype
) -> None:
    tokens = torch.randint(0, VOCAB, (5, 8)).to(dtype)
    path = tmp_path / f"tokens{suffix}"
    torch.save(tokens, path) if suffix == ".pt" else save_file({"tokens": tokens}, path)
    assert torch.equal(load_tokens(path, model), tokens.to(torch.int64))


def test_stream_is_cut_into_windows_of_the_models_context(model: Model) -> None:
    tokens = torch.arange(100)
    assert torch.equal(load_tokens(tokens, model), tokens[:80].view(2, CONTEXT))


def test_builtin_text_is_the_default(model: Model) -> None:
    windows = load_windows(None, model, byte_tokenizer, seq_len=32, samples=4)
    assert windows.shape == (4, 32)


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(8, 200),
    seq_len=st.integers(2, 8),
    samples=st.integers(1, 30),
    seed=st.integers(0, 5),
)
def test_sampled_windows_are_distinct_pieces_of_the_stream(
    length: int, seq_len: int, samples: int, seed: int
) -> None:
    stream = torch.arange(length)
    options = {"seq_len": seq_len, "samples": samples, "seed": seed}
    windows = load_windows(stream, Model(), **options)
    starts = windows[:, 0].tolist()
    assert torch.equal(windows, windows[:, :1] + torch.arange(seq_len))
    assert len(set(starts)) == len(starts) == min(samples, length - seq_len + 1)
    if samples <= length // seq_len:
        assert all(b - a >= seq_len for a, b in itertools.pairwise(starts)), "overlap"
    assert torch.equal(windows, load_windows(stream, Model(), **options))


def test_another_seed_takes_other_windows(model: Model) -> None:
    tokens = torch.arange(256).view(32, 8)
    first, second = (load_windows(tokens, model, samples=8, seed=seed) for seed in (0, 1))
    assert first.shape == second.shape == (8, 8)
    assert not torch.equal(first, second)
    rows = {tuple(row) for row in tokens.tolist()}
    assert {tuple(row) for row in first.tolist()} <= rows


def _fake_datasets(asked: list[tuple[Any, ...]], rows: list[dict[str, Any]]) -> ModuleType:
    module = ModuleType("datasets")

    def load_dataset(path: str, config: str | None, split: str, streaming: bool) -> Any:
        asked.append((path, config, split, streaming))
        return iter(rows)  # a stream knows neither its columns nor its length

    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    return module


def test_dataset_is_read_until_there_are_enough_tokens(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    rows = [{"id": i, "body": f"row {i} of the data"} for i in range(1000)]
    monkeypatch.setitem(sys.modules, "datasets", _fake_datasets(asked, rows))
    windows = load_windows("owner/name:tiny:test", model, byte_tokenizer, seq_len=8, samples=4)
    assert asked == [("owner/name", "tiny", "test", True)]
    assert windows.shape == (4, 8)
    text = "\n\n".join(row["body"] for row in rows[:3])
    assert all(bytes(row.tolist()).decode() in text for row in windows)


def test_dataset_without_text_is_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", _fake_datasets([], [{"id": 1, "body": 2}]))
    with pytest.raises(
        ValueError, match=r"calibration: got columns .* in owner/name, expected one"
    ):
        load_windows("owner/name", model, byte_tokenizer)


def _tokens(*shape: int, dtype: torch.dtype = torch.int64, fill: int = 1) -> Tensor:
    return torch.full(shape, fill, dtype=dtype)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (_tokens(0, 8), {}, r"data: got no tokens \(\[0, 8\]\)"),
        ("   ", {}, "data: got an empty text"),
        (TEXT, {"tokenizer": None}, "tokenizer: got None, expected a tokenizer"),
        (_tokens(5), {"seq_len": 6}, "data: got 5 tokens, expected at least one window of 6"),
        ("a b", {"seq_len": 6}, "data: got 3 tokens, expected at least one window of 6"),
        (_tokens(2, 8, fill=VOCAB), {}, f"data: got token {VOCAB}, expected .* less than {VOCAB}"),
        (_tokens(2, 8, fill=-1), {}, "data: got token -1, expected tokens of at least 0"),
        (_tokens(99), {"seq_len": 41}, "seq_len: got 41, expected at most the model's context"),
        (_tokens(2, 41), {}, "seq_len: got 41, expected at most the model's context of 40"),
        (_tokens(99), {"seq_len": 1}, "seq_len: got 1, expected at least 2"),
        (_tokens(2, 8), {"seq_len": 9}, "data: got windows of 8 tokens, expected seq_len = 9"),
        (_tokens(2, 8, dtype=torch.float32), {}, r"data: got float32 \[2, 8\], expected int64"),
        (_tokens(2, 8, 2), {}, r"data: got int64 \[2, 8, 2\], expected int64"),
        ("no_such_file.txt", {}, "data: got no_such_file.txt, expected an existing file"),
        ([Path("missing")], {}, "data: got 'missing', expected the path of a text file"),
        (3.5, {}, "data: got float, expected text, a path"),
    ],
    ids=[
        "no_windows",
        "blank_text",
        "no_tokenizer",
        "stream_too_short",
        "text_too_short",
        "token_too_large",
        "token_negative",
        "window_beyond_context",
        "own_window_beyond_context",
        "window_of_one",
        "other_window",
        "float_tokens",
        "three_dimensions",
        "missing_file",
        "missing_path",
        "no_source",
    ],
)
def test_bad_data_is_named(model: Model, source: Any, options: Any, message: str) -> None:
    options = {"tokenizer": byte_tokenizer, **options}
    with pytest.raises(ValueError, match=message):
        load_tokens(source, model, **options)


def test_dataset_name_needs_the_package(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ValueError, match=r"got 'owner/name', which is no file; .*llmkern\[datasets"
    ):
        load_windows("owner/name", model, byte_tokenizer)


class Bomb:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exit, (3,))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokens.pt", b"not a tensor", "expected a readable token tensor"),
        ("tokens.safetensors", b"\xff" * 40, "expected a readable token tensor"),
        ("text.txt", b"\xff\xfe\x00", "expected UTF-8 text"),
    ],
)
def test_damaged_files_are_refused(
    model: Model, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokens(path, model, byte_tokenizer)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pickled_code_is_not_run(model: Model, tmp_path: Path) -> None:
    torch.save(Bomb(), tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match="expected a readable token tensor"):
        load_tokens(tmp_path / "bomb.pt", model)


def test_file_of_several_tensors_is_refused(model: Model, tmp_path: Path) -> None:
    torch.save({"a": _tokens(2, 8), "b": _tokens(2, 8)}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match=r"got dict in .*, expected one tensor"):
        load_tokens(tmp_path / "two.pt", model)


def test_samples_must_be_positive(model: Model) -> None:
    with pytest.raises(ValueError, match="samples: got 0, expected at least 1"):
        load_windows(_tokens(2, 8), model, samples=0)
