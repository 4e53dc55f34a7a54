"""The comparison of methods: all there are, each on the original, and reasons where one cannot be."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

import llmkern
from llmkern import assets
from llmkern.cli import main
from llmkern.drive import find_method
from llmkern.pipeline import STAGES, PipelineReport, Quantize
from llmkern.pipeline.compare import chosen_labels, compare, compared

VOCAB = 96
BUNDLED = str(assets.bundled_model_dir())


tiny = partial(
    tiny_models.tiny,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    initializer_range=0.2,
    bos_token_id=0,
    eos_token_id=0,
)


@pytest.fixture
def data() -> dict[str, Any]:
    """Calibration and evaluation tokens, and as little work as there can be."""
    windows = torch.randint(1, VOCAB, (12, 16))
    return {
        "calibration": windows[:8],
        "evaluation": windows[8:],
        "samples": 8,
        "steps": 2,
        "speed": False,
    }


def test_every_label_names_one_valid_stage() -> None:
    offered = compared()
    assert len(offered) == sum(len(kind.compared()) for kind in STAGES.values())
    for kind, options in offered.values():
        prompts = {"prompts": ["a"]} if "prompts" in options else {}
        stage = kind(**{**options, **prompts})
        assert stage.method == options["method"]


def test_choice_by_kind_method_and_label() -> None:
    everything = chosen_labels(None)
    assert everything == list(compared())
    assert chosen_labels(["rtn"]) == ["rtn 4-bit", "rtn 3-bit"]
    assert chosen_labels(["nf4", "sparsegpt 2:4"]) == ["sparsegpt 2:4", "nf4"]
    assert set(chosen_labels(["prune", "quantize", "distill"])) == set(everything)
    with pytest.raises(ValueError, match="methods: got 'gtpq', did you mean gptq"):
        chosen_labels(["rtn", "gtpq"])


def test_rows_of_every_driver_start_from_the_original(data: dict[str, Any]) -> None:
    model = tiny()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    said: list[str] = []
    methods = ["magnitude 50 %", "glu", "rtn 4-bit", "nf4", "distill soft"]
    report = compare(model, said=said.append, methods=methods, **data)
    assert [record.label for record in report.stages] == [
        "original",
        "magnitude 50 %",
        "glu 20 %",
        "rtn 4-bit",
        "nf4",
        "distill soft",
    ]
    assert report.left_out == {}
    assert not report.in_sequence
    rows = {record.label: record for record in report.stages}
    for label, record in rows.items():
        assert record.evaluation["protocol"] == {
            "tokens": 64,
            "window": 16,
            "compute_dtype": "float32",
        }
        assert (record.evaluation["kl"] is None) == (label == "original")
    # Each alone: a model of 4 bits is neither thinner nor shallower.
    whole = rows["original"].parameters
    assert rows["rtn 4-bit"].parameters == rows["magnitude 50 %"].parameters == whole
    assert rows["glu 20 %"].parameters < whole
    assert rows["distill soft"].parameters < 0.6 * whole
    assert rows["rtn 4-bit"].disk_bytes < 0.5 * rows["original"].disk_bytes
    again = copy.deepcopy(model)
    llmkern.quantize(again, "rtn")
    alone = llmkern.evaluate(again, data["evaluation"], reference=model, speed=False)
    assert rows["rtn 4-bit"].evaluation["kl"] == pytest.approx(alone.kl, rel=1e-6)
    assert rows["distill soft"].options["steps"] == 2
    assert rows["glu 20 %"].options["samples"] == 8
    assert len(said) == 5
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_sparse_layers_are_measured_on_the_sparse_kernels(data: dict[str, Any]) -> None:
    report = compare(tiny(), methods=["magnitude"], **data)
    half, pattern = (
        next(r for r in report.stages if r.label == label).evaluation["weight_bytes"]
        for label in ("magnitude 50 %", "magnitude 2:4")
    )
    assert pattern < 0.75 * half


def test_speed_of_the_original_is_measured_beside_each_method(data: dict[str, Any]) -> None:
    report = compare(tiny(), methods=["rtn 4-bit"], **{**data, "speed": True})
    beside = report.stages[1].evaluation["original"]
    assert beside["prefill_tokens_per_s"] > 0
    assert beside["decode_tokens_per_s"] > 0


@pytest.mark.slow
def test_a_method_that_cannot_be_applied_is_listed_with_its_reason(data: dict[str, Any]) -> None:
    plain = tiny("gpt_neox", hidden_act="gelu", intermediate_size=200)
    report = compare(plain, methods=["glu", "heads", "mlp", "magnitude 50 %"], **data)
    assert [record.label for record in report.stages] == ["original", "magnitude 50 %", "mlp 20 %"]
    assert "expected gate, up and down" in report.left_out["glu 20 %"]
    assert "key/value heads" in report.left_out["heads 50 %"]
    few = compare(tiny(num_hidden_layers=2), methods=["depth"], **data)
    assert few.left_out.keys() == {"depth 25 %"}
    assert "blocks" in few.left_out["depth 25 %"]


def test_prompts_need_a_tokenizer_and_the_reason_says_so(data: dict[str, Any]) -> None:
    report = compare(tiny(), methods=["sequence"], **data)
    assert "tokenizer: got None" in report.left_out["distill sequence"]


@pytest.mark.slow
def test_one_copy_at_a_time(data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, alive, most = tiny(), [], 0
    whole = copy.deepcopy

    def counted(value: Any, memo: Any = None) -> Any:
        nonlocal most
        made = whole(value, memo)
        if value is model:
            alive.append(weakref.ref(made))
            most = max(most, sum(reference() is not None for reference in alive))
        return made

    monkeypatch.setattr(copy, "deepcopy", counted)
    compare(model, methods=["magnitude", "rtn", "distill soft"], **data)
    assert len(alive) == 5  # the student is the only copy of its row
    assert most == 1


def test_what_a_driver_adds_appears(data: dict[str, Any]) -> None:
    rtn = find_method(Quantize.methods, "rtn")
    rows = {"rtn in groups of 32": {"group_size": 32}}
    more = dataclasses.replace(rtn, name="rtn again", compared=rows)
    Quantize.methods.append(more)
    try:
        report = compare(tiny(), methods=["rtn in groups of 32"], **data)
    finally:
        Quantize.methods.remove(more)
    assert [record.label for record in report.stages] == ["original", "rtn in groups of 32"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "samples: got 0, expected at least 1"),
        ({"methods": ["x"]}, "methods: got 'x'"),
        ({"evaluation": torch.full((1, 16), VOCAB)}, f"evaluation: got token {VOCAB}"),
        ({"calibration": torch.ones(2, 16)}, "calibration: got float32"),
        ({"prompts": ["x"]}, "tokenizer: got None"),
    ],
)
def test_bad_requests_are_refused(
    data: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare(tiny(), **{**data, **changes})


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    path = tmp_path / "held_out.pt"
    windows: Tensor = torch.randint(3, 2000, (2, 64))
    torch.save(windows, path)
    return path


def command(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["llmkern", "compare", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.mark.slow
def test_command_prints_the_table_and_writes_the_report(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    held_out: Path,
) -> None:
    out = tmp_path / "out"
    options = ["--samples", 4, "--seq-len", 64, "--evaluation", held_out, "--dtype", "float32"]
    methods = ["--methods", "rtn 4-bit, wanda 2:4,sequence,in_context", "--steps", 1]
    code = command(monkeypatch, BUNDLED, "-o", out, *methods, *options)
    text, err = capsys.readouterr()
    assert code == 0, err
    report = PipelineReport.from_dict(json.loads((out / "report.json").read_text()))
    labels = [record.label for record in report.stages]
    assert labels == [
        "original",
        "wanda 2:4",
        "rtn 4-bit",
        "distill sequence",
        "distill in context",
    ]
    assert all(label in text for label in labels)
    held = (Path(BUNDLED) / "model.safetensors").stat().st_size  # in bfloat16
    assert report.stages[0].disk_bytes == pytest.approx(2 * held, rel=0.01)
    assert report.command.startswith("llmkern compare")
    assert [len(record.generations) for record in report.stages] == [1] * len(labels)
    assert sorted(path.name for path in out.iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]


def test_command_names_the_nearest_method(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert command(monkeypatch, "nowhere", "--methods", "wandb", "-o", tmp_path / "out") == 1
    assert "did you mean wanda" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
