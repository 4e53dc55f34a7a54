"""llmkern distill, as a user calls it."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import llmkern
from llmkern import assets
from llmkern.cli import build_app

TEACHER = str(assets.bundled_model_dir())
SHORT = ["--steps", 2, "--batch-size", 1]


def run(*arguments: object, teacher: str | None = TEACHER):
    first = ["distill"] if teacher is None else ["distill", teacher]
    return CliRunner().invoke(build_app(), [*first, *map(str, arguments)])


def report(directory) -> dict:
    return json.loads((directory / "llmkern_report.json").read_text())


def test_makes_trains_and_saves_a_student(tmp_path):
    options = [*SHORT, "--seq-len", 32, "--samples", 4, "--alpha", 0.9]
    result = run("-o", tmp_path / "out", "--student-layers", 0.5, *options)
    assert result.exit_code == 0, result.output
    student = llmkern.load(tmp_path / "out")
    teacher = llmkern.load(TEACHER)
    assert student.config.num_hidden_layers == round(0.5 * teacher.config.num_hidden_layers)
    assert torch.isfinite(student(torch.tensor([[1, 2, 3]])).logits).all()
    assert report(tmp_path / "out")["options"]["alpha"] == 0.9
    assert len(report(tmp_path / "out")["training"]["steps"]) == 2


@pytest.mark.slow
def test_narrow_student_from_answers_then_again_from_the_file(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def main():\nimport os\n")
    options = ["--method", "sequence", *SHORT, "--top-p", 0.9]
    asked = ["--prompts", prompts, "--max-new-tokens", 5]
    result = run("-o", tmp_path / "a", "--student-width", 0.5, *options, *asked)
    assert result.exit_code == 0, result.output
    kept = tmp_path / "a.answers.jsonl"
    assert len(kept.read_text().splitlines()) == 3
    student = llmkern.load(tmp_path / "a")
    assert student.config.num_hidden_layers == 4
    assert student.config.intermediate_size == 256
    options = ["--method", "sequence", *SHORT, "--answers", kept, "--student", tmp_path / "a"]
    result = run("-o", tmp_path / "b", *options, teacher=None)
    assert result.exit_code == 0, result.output
    assert report(tmp_path / "b")["windows"] == report(tmp_path / "a")["windows"]


def test_in_context_asks_by_examples_and_template(tmp_path):
    prompts, examples = tmp_path / "prompts.jsonl", tmp_path / "examples.jsonl"
    prompts.write_text('{"prompt": "def main():\\n"}\n')
    examples.write_text('{"instruction": "import os", "output": "import sys"}\n')
    given = ["--method", "in_context", *SHORT, "--prompts", prompts, "--max-new-tokens", 4]
    given += [
        "--demonstrations",
        examples,
        "--shots",
        1,
        "--template",
        "# {prompt}",
        "--alpha",
        0.5,
    ]
    given += ["--demonstration", "{prompt}\n{answer}\n\n", "--answers", tmp_path / "kept.jsonl"]
    result = run("-o", tmp_path / "out", *given)
    assert result.exit_code == 0, result.output
    assert report(tmp_path / "out")["options"]["template"] == "# {prompt}"
    assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == 2
    assert report(tmp_path / "out")["training"]["steps"][0]["metrics"]["kd"] > 0


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("gkd", {"on_policy": 1.0, "prompt_len": 4, "divergence": "reverse_kl"}),
        ("minillm", {"teacher_mix": 0.5, "length_norm": False, "importance": "sequence"}),
    ],
)
def test_on_policy_methods_get_their_options(method, options, tmp_path):
    given = ["--method", method, *SHORT, "--seq-len", 40, "--max-new-tokens", 3]
    for name, value in options.items():
        flag = name.replace("_", "-")
        given += [f"--no-{flag}"] if value is False else [f"--{flag}", value]
    result = run("-o", tmp_path / "out", *given)
    assert result.exit_code == 0, result.output
    used = report(tmp_path / "out")["options"]
    assert used.items() >= options.items()
    assert used["max_new_tokens"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--method", "gkd", "--teacher-mix", 0.5],
            "--teacher-mix: got 0.5, expected nothing: --method gkd",
        ),
        (["--student", "x", "--student-layers", 0.5], "got both, expected one of them"),
        (
            ["--hidden-weight", 2.0, "--steps", 1],
            "--hidden-weight: got 2.0, expected nothing: --method soft",
        ),
        (
            ["--prompts", "x", "--steps", 1],
            "--prompts: got x, expected nothing: --method soft has no",
        ),
        (
            ["--method", "sequence", "--alpha", 0.5],
            "--alpha: got 0.5, expected nothing: --method sequence",
        ),
        (
            ["--method", "sequence", "--answers", "x", "--student", TEACHER],
            "expected none: answers come from a file",
        ),
    ],
)
def test_contradictions_are_refused(options, message, tmp_path):
    result = run("-o", tmp_path / "out", *options)
    assert result.exit_code != 0
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--student", TEACHER], "TEACHER_DIR: got none, expected a directory"),
        (["--method", "sequence", "--prompts", "x", "--student", TEACHER], "TEACHER_DIR: got none"),
        (["--method", "sequence", "--answers", "x"], "--student: got none and no TEACHER_DIR"),
    ],
)
def test_a_missing_teacher_is_refused_where_it_is_needed(options, message, tmp_path):
    result = run("-o", tmp_path / "out", *options, teacher=None)
    assert message in str(result.exception)
