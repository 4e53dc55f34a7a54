"""What commands say while they work, wherever it goes: a log, a pipe that is gone, ASCII."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny, words

import llmkern
from llmkern._progress import lines_every
from llmkern.cli import main

Run = Callable[..., int]
LINE = re.compile(r"[\w ]+: \d+ of \d+ \w+, (\d+ \w+ ?)+(, about (\d+ \w+ ?)+ left)?(, .*)?")
SMALL = ("--no-speed", "--evaluation-windows", "2")

VERBS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "quantize": (
        ["quantize", "MODEL", "-o", "OUT", "--group-size", "32", "--calibration", "TOKENS"],
        ("quantize: 21 of 21 layers",),
    ),
    "prune": (
        ["prune", "MODEL", "-o", "OUT", "--sparsity", "0.5", "--calibration", "TOKENS"],
        ("prune: 21 of 21 layers",),
    ),
    "depth": (
        [
            *("prune", "MODEL", "-o", "OUT", "--method", "depth", "--ratio", "0.34"),
            *("--calibration", "TOKENS"),
        ],
        ("prune: ",),
    ),
    "distill": (
        [
            *(
                "distill",
                "MODEL",
                "-o",
                "OUT",
                "--data",
                "TOKENS",
                "--steps",
                "3",
                "--batch-size",
                "2",
            ),
            *("--student-layers", "0.5"),
        ],
        ("train: 3 of 3 steps",),
    ),
    "eval": (["eval", "MODEL", "--tokens", "TOKENS"], ("evaluate: 2 of 2 batches",)),
    "compress": (
        ["compress", "MODEL", "-o", "OUT", "--recipe", "RECIPE", "--evaluation", "TOKENS", *SMALL],
        (
            "measuring the original",
            "stage 1 of 1: quantize rtn",
            "quantize: 21 of 21 layers",
            "evaluate: 1 of 1 batch,",
            "continue prompts: 2 of 2 prompts",
            "cost of each block: 3 of 3 blocks",
        ),
    ),
    "compare": (
        [
            *(
                "compare",
                "MODEL",
                "-o",
                "OUT",
                "--methods",
                "rtn",
                "--evaluation",
                "TOKENS",
                "--no-speed",
            ),
            *("--calibration", "TOKENS"),
        ],
        ("evaluate: 2 of 2 batches", "quantize: ", "rtn 3-bit: "),
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    tiny(seed=0, std=0.1, vocab_size=16, num_hidden_layers=3).save_pretrained(folder / "model")
    words().save_pretrained(folder / "model")
    save_file({"tokens": torch.arange(8 * 16).view(8, 16) % 16}, folder / "tokens.safetensors")
    (folder / "recipe.yaml").write_text("- quantize: {method: rtn, group_size: 32}\n")
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a verb in this process; its exit code."""
    names = {
        "MODEL": made / "model",
        "TOKENS": made / "tokens.safetensors",
        "RECIPE": made / "recipe.yaml",
        "OUT": tmp_path / "out",
    }

    def call(verb: str) -> int:
        words = [str(names.get(word, word)) for word in VERBS[verb][0]]
        monkeypatch.setattr(sys, "argv", ["llmkern", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0)

    return call


@pytest.mark.parametrize("verb", VERBS)
def test_a_log_has_whole_lines(verb: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with lines_every(0.05):
        code = run(verb)
    out, err = capsys.readouterr()
    assert code == 0, err
    for text in (out, err):
        assert "\r" not in text
        assert "\x1b" not in text
    for said in VERBS[verb][1]:
        assert any(line.startswith(said) for line in err.splitlines()), (said, err)
    of_bars = [line for line in err.splitlines() if re.match(r"[\w ]+: \d+ of \d+ ", line)]
    assert of_bars
    assert all(LINE.fullmatch(line) for line in of_bars), of_bars


class Gone(io.StringIO):
    """A pipe whose reader is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def in_encoding(name: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=name)


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "closed": closed,
    "gone": Gone,
    "ascii": lambda: in_encoding("ascii"),
    "cp1252": lambda: in_encoding("cp1252"),
}


@pytest.mark.parametrize(
    ("verb", "kind"),
    [
        *(("quantize", kind) for kind in STREAMS),
        *(("compress", kind) for kind in ("none", "gone", "ascii")),
        *(("eval", "gone"), ("compare", "cp1252")),
    ],
)
def test_no_stream_ends_the_work(
    verb: str, kind: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", STREAMS[kind]())
    monkeypatch.setattr(sys, "stderr", STREAMS[kind]())
    code = run(verb)
    monkeypatch.undo()
    assert code == 0
    if verb in ("quantize", "compress"):
        assert llmkern.load(tmp_path / "out") is not None
    if verb in ("compress", "compare"):
        assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize("columns", ["0", "7", "nonsense"])
def test_no_width_ends_the_work(columns: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert run("compress") == 0


@pytest.mark.slow
def test_a_reader_that_leaves(made: Path, tmp_path: Path) -> None:
    """`llmkern ... | head -1`, with a locale of ASCII."""
    command = [
        *(sys.executable, "-m", "llmkern", "compress", made / "model", "-o", tmp_path / "out"),
        *("--recipe", made / "recipe.yaml", "--evaluation", made / "tokens.safetensors", *SMALL),
    ]
    shell = " ".join(map(str, command))
    ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    root = str(Path(llmkern.__file__).parent.parent)
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {shell} | true"],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": root, "HOME": str(tmp_path), **ascii_only},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert llmkern.load(tmp_path / "out") is not None
