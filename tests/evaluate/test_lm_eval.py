"""The hand-over to lm_eval: to a stand-in always, to the real one where it is installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import llmkern
from llmkern import assets
from llmkern.evaluate.lm_eval import Tasks, figures
from llmkern.nn import IntLinear

BUNDLED = str(assets.bundled_model_dir())
ANSWER = {
    "results": {
        "hellaswag": {
            "alias": "hellaswag",
            "acc,none": 0.25,
            "acc_stderr,none": 0.125,
            "exact,strict-match": 0.5,
            "exact_stderr,strict-match": "N/A",
        }
    },
    "versions": {"hellaswag": 1.0},
    "n-shot": {"hellaswag": 2},
    "n-samples": {"hellaswag": {"original": 100, "effective": 4}},
    "config": {"model": object()},
}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(run: Run) -> Run:
    """Run `llmkern eval ARGS...`."""
    return partial(run, "eval")


class TaskManager:
    all_tasks = ("hellaswag", "arc_easy", "arc_challenge")

    def __init__(self, include_path: str | None = None) -> None:
        self.include_path = include_path

    def match_tasks(self, names: list[str]) -> list[str]:
        (pattern,) = names
        return [task for task in self.all_tasks if task.startswith(pattern.removesuffix("*"))]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A module in lm_eval's place; the calls that it got."""
    calls: list[dict[str, Any]] = []

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        calls.append(options)
        return ANSWER

    parts = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.tasks": {"TaskManager": TaskManager},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **options: SimpleNamespace(**options)},
    }
    for name, entries in parts.items():
        module = ModuleType(name)
        vars(module).update(entries)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_the_loaded_model_is_handed_over_packed(
    run: Run, stand_in: list[dict[str, Any]], tmp_path: Path
) -> None:
    model = llmkern.load(BUNDLED)
    llmkern.quantize(model, "rtn")
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    llmkern.save(model, tmp_path / "packed", tokenizer)
    options = ["--tasks", "hellaswag, arc_*", "--limit", 4, "--num-fewshot", 2, "--batch-size", 3]
    code, text, err = run(tmp_path / "packed", *options, "--json", tmp_path / "r.json")
    assert code == 0, err
    (call,) = stand_in
    assert call["tasks"] == ["hellaswag", "arc_easy", "arc_challenge"]
    assert (call["limit"], type(call["limit"]), call["num_fewshot"]) == (4, int, 2)
    assert isinstance(call["task_manager"], TaskManager)
    harness = call["model"]
    assert harness.batch_size == 3
    assert any(isinstance(module, IntLinear) for module in harness.pretrained.modules())
    assert harness.tokenizer.get_vocab() == tokenizer.get_vocab()
    for figure in ("hellaswag", "acc", "0.2500", "0.1250", "strict-match", "0.5000"):
        assert figure in text
    kept = json.loads((tmp_path / "r.json").read_text())
    assert kept["results"] == ANSWER["results"]
    assert "config" not in kept


def test_figures_pair_values_with_their_errors() -> None:
    assert figures(ANSWER) == [
        ("hellaswag", "acc", 0.25, 0.125),
        ("hellaswag", "exact (strict-match)", 0.5, None),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "helaswag"], "tasks: got 'helaswag', did you mean hellaswag"),
        (["--tasks", "zzz"], "tasks: got 'zzz', which lm_eval has not"),
        (["--tasks", ","], "tasks: got none"),
        (
            ["--tasks", "hellaswag", "--text", "x.txt"],
            "--text: got x.txt, expected it only without",
        ),
        (["--tasks", "hellaswag", "--limit", "0"], "limit: got 0.0, expected a positive number"),
        (["--tasks", "hellaswag", "--num-fewshot", "-1"], "num_fewshot: got -1"),
        (["--tasks", "hellaswag", "--include-path", "no"], "include_path: got 'no'"),
        (["--text", "x.txt", "--limit", "3"], "--limit: got 3.0, expected it only with --tasks"),
    ],
)
def test_bad_requests_are_one_line(
    run: Run, stand_in: list[dict[str, Any]], options: list[str], message: str
) -> None:
    code, _, err = run(BUNDLED, *options)
    assert code == 1
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert stand_in == []


def test_without_lm_eval_the_message_says_how_to_get_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = run("no-such-model", "--tasks", "hellaswag")
    assert code == 1
    assert "pip install 'llmkern[eval]'" in err
    assert len(err.strip().splitlines()) == 1


@pytest.fixture
def own_task(tmp_path: Path) -> list[tuple[str, tuple[str, str]]]:
    """A task of our own in a YAML file of `tmp_path`: the questions, with two choices each."""
    questions = [
        ("def read(self", (", path):", " %% 3")),
        ("import os\nimport", (" }", " sys")),
        ("for i in", (" range(3):", " class")),
    ]
    rows = [{"q": text, "a": choices[0], "b": choices[1]} for text, choices in questions]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "own.yaml").write_text(
        f"""
task: own_task
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "data.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{[a, b]}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
    )
    return questions


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_the_real_harness_agrees_with_the_models_own_likelihoods(
    own_task: list[tuple[str, tuple[str, str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model = llmkern.load(BUNDLED, dtype=torch.float32)
    llmkern.quantize(model, "rtn")
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    right = 0
    for text, choices in own_task:
        start = len(tokenizer(text).input_ids)
        scores = []
        for choice in choices:
            ids = tokenizer(text + choice, return_tensors="pt").input_ids
            with torch.no_grad():
                logits = model(input_ids=ids).logits.log_softmax(-1)
            scores.append(float(logits[0, :-1].gather(1, ids[0, 1:, None])[start - 1 :].sum()))
        right += scores[0] > scores[1]
    assert 0 < right < 3
    answer = Tasks(["own_task"], tmp_path).run(model, tokenizer, batch_size=2)
    assert answer["results"]["own_task"]["acc,none"] == pytest.approx(right / 3)
    assert answer["n-samples"]["own_task"]["effective"] == 3
    with pytest.raises(ValueError, match="did you mean own_task"):
        Tasks(["own_tsk"], tmp_path)
