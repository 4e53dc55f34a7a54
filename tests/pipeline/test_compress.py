"""The command: what it writes and prints, and one line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import llmkern
from llmkern.cli import main

RECIPE = """\
- prune: {method: magnitude, sparsity: 0.5}
- quantize: {method: gptq, group_size: 32}
"""


@pytest.fixture
def compress(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """`llmkern compress ARGUMENTS...` in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llmkern", "compress", *map(str, arguments)])
        capsys.readouterr()  # what the fixtures printed
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), *capsys.readouterr()

    return call


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


@pytest.mark.slow
def test_command_compresses_and_reports(compress, recipe, model_dir, tokens, held_out, tmp_path):
    out = tmp_path / "out"
    given = [model_dir, "-o", out, "--recipe", recipe, "--calibration", tokens]
    words = [sys.executable, "-m", "llmkern", "compress", *map(str, given)]
    words += ["--evaluation", str(held_out), "--dtype", "bfloat16"]
    result = subprocess.run(
        words, capture_output=True, text=True, cwd=Path(llmkern.__file__).parents[1]
    )
    assert result.returncode == 0, result.stderr
    assert "stage 1 of 2: prune magnitude 50 %" in result.stderr
    assert "stay as they were: embeddings" in result.stderr
    assert "stage 2 of 2: quantize gptq 4 bits" in result.stderr
    for text in ("original", "quantize gptq 4 bits", "saved to", "report.html"):
        assert text in result.stdout
    report = json.loads((out / "report.json").read_text())
    words = ["llmkern", "compress", *map(str, given)]
    assert report["command"].startswith(" ".join(words))
    assert [stage["name"] for stage in report["stages"]] == ["original", "1-prune", "2-quantize"]
    assert report["stages"][2]["evaluation"]["decode_tokens_per_s"] > 0
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert len(llmkern.load(out).model.layers) == 4

    code, _, errors = compress(*given, "--evaluation", held_out)
    assert code == 1
    assert "holds a run with 2 finished stages, expected a new directory, or resume" in errors
    recipe.write_text(RECIPE.replace("0.5", "0.6"))
    given += ["--evaluation", held_out, "--dtype", "bfloat16", "--resume"]
    code, _, errors = compress(*given)
    assert code == 1
    assert errors.count("\n") == 1
    assert "recipe.1-prune.sparsity: was 0.5, is 0.6; expected the same" in errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- quantize:\n    group_sise: 32", "recipe.yaml:2: quantize: group_sise: unknown, did you mean"),
        (RECIPE, "2-quantize: calibration: got none for quantize gptq 4 bits, expected text"),
        ("- quantize: {calibration: nowhere.txt}", "calibration: got nowhere.txt, expected an existing"),
    ],
    ids=["unknown", "no_data", "no_file"],
)  # fmt: skip
def test_mistakes_are_one_line_and_nothing_is_written(
    text, message, compress, recipe, model_dir, held_out, tmp_path
):
    recipe.write_text(text)
    out = tmp_path / "out"
    code, _, errors = compress(model_dir, "-o", out, "--recipe", recipe, "--evaluation", held_out)
    assert code == 1
    assert errors.startswith("llmkern: error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert not out.exists()


def test_dry_run_prints_the_preflight_and_writes_nothing(
    compress, recipe, model_dir, tokens, held_out, tmp_path
):
    out = tmp_path / "out"
    given = [model_dir, "-o", out, "--recipe", recipe, "--dry-run"]
    code, printed, errors = compress(*given, "--calibration", tokens)
    assert code == 0, errors
    for text in ("1-prune", "2-quantize", "peak memory", "disk in all"):
        assert text in printed
    code, printed, _ = compress(*given)
    assert code == 1
    assert "error: 2-quantize: calibration: got none" in printed
    assert not out.exists()
