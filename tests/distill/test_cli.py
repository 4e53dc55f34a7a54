"""llmkern distill, as a user calls it."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import llmkern
from llmkern import assets
from llmkern.cli.app import app


def run(*arguments: object):
    return CliRunner().invoke(
        app, ["distill", str(assets.bundled_model_dir()), *map(str, arguments)]
    )


def test_makes_trains_and_saves_a_student(tmp_path):
    options = ["--steps", 2, "--batch-size", 1, "--seq-len", 32, "--samples", 4, "--alpha", 0.9]
    result = run("-o", tmp_path / "out", "--student-layers", 0.5, *options)
    assert result.exit_code == 0, result.output
    student = llmkern.load(tmp_path / "out")
    teacher = llmkern.load(assets.bundled_model_dir())
    assert student.config.num_hidden_layers == round(0.5 * teacher.config.num_hidden_layers)
    assert torch.isfinite(student(torch.tensor([[1, 2, 3]])).logits).all()
    report = json.loads((tmp_path / "out" / "llmkern_report.json").read_text())
    assert report["options"]["alpha"] == 0.9
    assert len(report["training"]["steps"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--student", "x", "--student-layers", 0.5], "got both, expected one of them"),
        (["--hidden-weight", 2.0, "--steps", 1], "hidden_weight: not an option of method 'soft'"),
    ],
)
def test_contradictions_are_refused(options, message, tmp_path):
    result = run("-o", tmp_path / "out", *options)
    assert result.exit_code != 0
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()
