"""Runs of a pipeline on a tiny model: every order, what they leave behind, resuming, refusals."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llmkern
from llmkern.nn import IntLinear
from llmkern.pipeline import (
    Distill,
    Pipeline,
    PipelineReport,
    Prune,
    Quantize,
    load_recipe,
    parse_recipe,
)
from llmkern.pipeline._order import order_warnings

PRUNE = Prune("glu", ratio=0.25)
QUANTIZE = Quantize("gptq", group_size=32)
DISTILL = Distill(student={"layers": 0.5}, steps=3, batch_size=2, lr=0.01)


def run(stages, model, output, tokens, held_out, **options) -> PipelineReport:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return Pipeline(stages).run(
            model, output, calibration=tokens, evaluation=held_out, speed=False, **options
        )


def logits(directory: Path) -> torch.Tensor:
    ids = torch.arange(16)[None]
    with torch.no_grad():
        return llmkern.load(directory)(ids).logits


def weights(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.glob("*.safetensors")}


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(order, marks=[pytest.mark.slow] if order[0] != PRUNE else [])
        for order in itertools.permutations([PRUNE, QUANTIZE, DISTILL])
    ],
    ids=lambda order: "-".join(stage.name for stage in order),
)
def test_every_order_runs_and_a_costly_one_warns(order, model_dir, tokens, held_out, tmp_path):
    out = tmp_path / "out"
    report = run(order, model_dir, out, tokens, held_out)
    names = [stage.name for stage in order]
    costly = order_warnings(order)
    assert bool(costly) == (names != ["prune", "quantize", "distill"])
    assert report.warnings[: len(costly)] == costly
    assert [record.stage for record in report.stages] == ["original", *names]
    for index, record in enumerate(report.stages[1:], 1):
        directory = out / record.directory
        assert directory == out / "stages" / f"{index}-{record.stage}"
        held = json.loads((directory / "llmkern_stage.json").read_text())
        assert held["record"] == json.loads(json.dumps(record.to_dict()))
        assert held["versions"]["llmkern"] == llmkern.__version__
        model = llmkern.load(directory)
        packed = any(isinstance(module, IntLinear) for module in model.modules())
        assert packed == (record.stage == "quantize")
        assert record.evaluation["kl"] > 0
        assert record.peak_memory_bytes > 1 << 20
        assert bool(record.sensitivity) == (record.stage != "distill")
    assert torch.equal(logits(out), logits(directory))
    assert load_recipe(out / "recipe.yaml") == list(order)
    assert not (out / "state").exists()
    held = json.loads((out / "report.json").read_text())
    assert PipelineReport.from_dict(held).to_dict() == json.loads(json.dumps(report.to_dict()))


def test_warnings_say_what_an_order_costs():
    assert order_warnings([PRUNE, QUANTIZE, DISTILL]) == []
    assert order_warnings([PRUNE, PRUNE]) == []
    assert order_warnings([PRUNE, QUANTIZE, DISTILL, QUANTIZE]) == []
    (text,) = order_warnings([QUANTIZE, PRUNE])
    assert text.startswith("stages 1 and 2: quantize before prune: pruning needs dense weights")
    (text,) = order_warnings([DISTILL, QUANTIZE])
    assert "rounded after its training" in text
    (text,) = order_warnings([DISTILL, PRUNE])
    assert "pruned away again" in text
    (text,) = order_warnings([QUANTIZE, QUANTIZE])
    assert "quantize once" in text
    (text,) = order_warnings([QUANTIZE, Distill(student="current")])
    assert text.startswith("stage 2: the student 'current' trains dense weights")
    # The student in between is dense and new.
    pairs = [text.split(": ")[1] for text in order_warnings([QUANTIZE, DISTILL, PRUNE])]
    assert pairs == ["distill before prune"]


@pytest.mark.slow
def test_run_says_that_it_had_to_expand_packed_layers(model_dir, tokens, held_out, tmp_path):
    report = run([QUANTIZE, PRUNE], model_dir, tmp_path / "out", tokens, held_out)
    assert "stage 2: 28 packed layers were expanded to dense ones to be pruned" in report.warnings
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.warns(UserWarning, match="quantize before prune"):
        Pipeline([QUANTIZE, PRUNE]).run(
            model_dir, tmp_path / "again", calibration=tokens, evaluation=held_out, speed=False
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "last", [QUANTIZE, Distill(student="current", steps=3)], ids=lambda stage: stage.name
)
def test_zeros_survive(last, model_dir, tokens, held_out, tmp_path):
    run([Prune("wanda", pattern="2:4"), last], model_dir, tmp_path / "out", tokens, held_out)
    before, after = (
        llmkern.load(tmp_path / "out" / "stages" / name) for name in ("1-prune", f"2-{last.name}")
    )
    for name, module in before.named_modules():
        if name.endswith("_proj"):
            other = after.get_submodule(name)
            dense = other.dequantize() if isinstance(other, IntLinear) else other.weight
            zeros = module.weight == 0
            assert int(zeros.sum()) == zeros.numel() // 2
            assert (dense[zeros] == 0).all()
            assert not torch.equal(dense, module.weight)


@pytest.mark.slow
def test_yaml_and_python_give_the_same_bits(model_dir, tokens, held_out, tmp_path):
    text = (
        "- prune: {method: glu, ratio: 0.25}\n- quantize: {method: gptq, group_size: 32}\n"
        "- distill: {student: {layers: 0.5}, steps: 3, batch_size: 2, lr: 1e-2}\n"
    )
    run([PRUNE, QUANTIZE, DISTILL], model_dir, tmp_path / "a", tokens, held_out)
    run(parse_recipe(text), model_dir, tmp_path / "b", tokens, held_out)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


@pytest.mark.slow
def test_model_in_memory_stays_as_it_is(model_dir, tokens, held_out, tmp_path):
    model = llmkern.load(model_dir)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run([PRUNE, QUANTIZE], model, tmp_path / "a", tokens, held_out)
    run([PRUNE, QUANTIZE], model_dir, tmp_path / "b", tokens, held_out)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    model.lm_head.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=r"resume: got another run than .*: model: was"):
        run([PRUNE, QUANTIZE], model, tmp_path / "a", tokens, held_out, resume=True)


@pytest.mark.slow
def test_students_and_teachers(model_dir, tokens, held_out, tmp_path):
    small = Distill(student={"layers": [0, 3], "width": 0.75}, teacher="original", steps=2)
    run([small], model_dir, tmp_path / "a", tokens, held_out)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    assert config["intermediate_size"] == 96
    given = Distill(student=str(tmp_path / "a"), steps=2, alpha=1.0)
    report = run([PRUNE, given], model_dir, tmp_path / "b", tokens, held_out)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["num_hidden_layers"] == 2
    assert report.stages[-1].driver["training"]["steps"][1]["metrics"]["kd"] > 0
    healing = Distill(student="current", alpha=1.0, steps=30, lr=3e-3)
    report = run([PRUNE, healing], model_dir, tmp_path / "c", tokens, held_out)
    assert json.loads((tmp_path / "c" / "config.json").read_text())["intermediate_size"] == 96
    kd = [step["metrics"]["kd"] for step in report.stages[-1].driver["training"]["steps"]]
    assert sum(kd[-5:]) < 0.5 * sum(kd[:5])


def test_finished_stages_are_read_and_not_done_again(
    model_dir, tokens, held_out, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    first = run([PRUNE, QUANTIZE], model_dir, out, tokens, held_out)
    monkeypatch.setattr(Prune, "run", lambda *_: pytest.fail("prunes again"))
    again = run([PRUNE, QUANTIZE], model_dir, out, tokens, held_out, resume=True)
    assert [record.to_dict() for record in again.stages] == [
        json.loads(json.dumps(record.to_dict())) for record in first.stages
    ]
    with pytest.raises(FileExistsError, match="holds a run with 2 finished stages, expected a new"):
        run([QUANTIZE], model_dir, out, tokens, held_out)
    run([QUANTIZE], model_dir, out, tokens, held_out, overwrite=True)
    assert [path.name for path in (out / "stages").iterdir() if path.is_dir()] == ["1-quantize"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ([Prune("glu", ratio=0.5), QUANTIZE], "recipe.1-prune.ratio: was 0.25, is 0.5"),
        ([PRUNE], "recipe.2-quantize.method: was 'gptq', is not there"),
        (
            [PRUNE, Quantize("gptq", group_size=32, seed=1)],
            "recipe.2-quantize.seed: was not there, is 1",
        ),
        ([QUANTIZE, PRUNE], "recipe.1-prune.method: was 'glu', is not there"),
    ],
)
def test_resume_refuses_a_changed_recipe(changed, message, model_dir, tokens, held_out, tmp_path):
    out = tmp_path / "out"
    run([PRUNE, QUANTIZE], model_dir, out, tokens, held_out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    with pytest.raises(ValueError, match="resume: got another run than the one in") as caught:
        run(changed, model_dir, out, tokens, held_out, resume=True)
    assert message in str(caught.value)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


@pytest.mark.slow
def test_resume_refuses_other_data_settings_and_models(model_dir, tokens, held_out, tmp_path):
    out = tmp_path / "out"
    own = Quantize("gptq", group_size=32, calibration=str(tokens))
    run([PRUNE, own], model_dir, out, tokens, held_out)

    def refused(message: str, **options) -> None:
        with pytest.raises(ValueError, match=f"resume: got another run .*: {message}"):
            run([PRUNE, own], model_dir, out, tokens, held_out, resume=True, **options)

    refused("evaluation_windows: was 64, is 2;", evaluation_windows=2)
    refused("dtype: was None, is 'bfloat16';", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"evaluation: was [0-9a-f]{12}, is [0-9a-f]{12};"):
        run([PRUNE, own], model_dir, out, tokens, tokens, resume=True)
    save_file({"input_ids": torch.ones(4, 16, dtype=torch.int64)}, tokens)
    refused(r"calibration: was .*files.2-quantize.calibration: was")
    state = load_file(model_dir / "model.safetensors")
    state["lm_head.weight"][0, 0] += 1
    save_file(state, model_dir / "model.safetensors", {"format": "pt"})
    refused("model: was")


@pytest.mark.slow
def test_other_versions_on_resuming_are_reported(model_dir, tokens, held_out, tmp_path):
    out = tmp_path / "out"
    run([QUANTIZE], model_dir, out, tokens, held_out)
    held = json.loads((out / "llmkern_run.json").read_text())
    held["versions"]["torch"] = "1.0"
    (out / "llmkern_run.json").write_text(json.dumps(held))
    report = run([QUANTIZE], model_dir, out, tokens, held_out, resume=True)
    changed = f"resumed with other versions: torch was 1.0, is {torch.__version__.split('+')[0]}"
    assert any(changed in text for text in report.warnings)


@pytest.mark.slow
def test_loss_that_becomes_nan_leaves_what_was_good(model_dir, tokens, held_out, tmp_path):
    out = tmp_path / "out"
    bad = Distill(student={"layers": 0.5}, steps=9, lr=1e30, warmup=0.5, checkpoint_every=1)
    with pytest.raises(FloatingPointError, match="loss"):
        run([PRUNE, bad], model_dir, out, tokens, held_out)
    llmkern.load(out / "stages" / "1-prune")
    assert not (out / "stages" / "2-distill").exists()
    assert not (out / "config.json").exists()
    state = load_file(out / "state" / "2-distill" / "newest" / "state.safetensors")
    assert all(torch.isfinite(t).all() for t in state.values() if t.is_floating_point())
    with pytest.raises(FloatingPointError, match="loss"):
        run([PRUNE, bad], model_dir, out, tokens, held_out, resume=True)


@pytest.mark.parametrize("stage", [PRUNE, QUANTIZE, DISTILL], ids=lambda stage: stage.name)
def test_stage_without_its_data_is_refused_before_anything_is_written(stage, model_dir, tmp_path):
    stages = [Prune("magnitude", sparsity=0.5), stage]
    with pytest.raises(
        ValueError, match=f"2-{stage.name}: calibration: got none for {stage.label}"
    ):
        Pipeline(stages).run(model_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_evaluation_that_cannot_be_read_is_refused_before_anything_is_written(
    model_dir, tokens, tmp_path
):
    with pytest.raises(ValueError, match=r"evaluation: got nowhere\.txt, expected an existing"):
        run([QUANTIZE], model_dir, tmp_path / "out", tokens, "nowhere.txt")
    with pytest.raises(ValueError, match="tokenizer: got None, expected a tokenizer"):
        run([QUANTIZE], model_dir, tmp_path / "out", tokens, None)
    assert not (tmp_path / "out").exists()


def test_preflight_refuses_all_that_is_impossible_at_once(model_dir, tokens, held_out, tmp_path):
    stages = [Quantize(group_size=48), Quantize(group_size=80)]
    seen = []
    with pytest.raises(
        ValueError, match=r"1-quantize: group_size: got 48.*2-quantize: group_size: got 80"
    ):
        run(stages, model_dir, tmp_path / "out", tokens, held_out, on_preflight=seen.append)
    assert len(seen[0].errors) == 2
    found = Pipeline(stages).preflight(model_dir, tmp_path / "out", calibration=tokens)
    assert list(map(str, found.errors)) == list(map(str, seen[0].errors))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_stage_may_have_data_of_its_own(model_dir, tokens, held_out, tmp_path):
    stages = [Quantize("gptq", group_size=32, calibration=str(tokens))]
    run(stages, model_dir, tmp_path / "a", None, held_out)
    run([QUANTIZE], model_dir, tmp_path / "b", tokens, held_out)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_output_is_not_taken_from_others(model_dir, tokens, held_out, tmp_path):
    def refused(error, message, output, **options) -> None:
        with pytest.raises(error, match=message):
            run([QUANTIZE], model_dir, output, tokens, held_out, **options)

    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        refused(FileExistsError, "other files", other, **options)
    refused(FileExistsError, "already holds a model", model_dir)
    refused(
        ValueError, "expected a directory that does not hold the model", model_dir, overwrite=True
    )
    refused(ValueError, "resume, overwrite: got both", other, resume=True, overwrite=True)
    refused(ValueError, "evaluation_windows: got 0", tmp_path / "out", evaluation_windows=0)
    assert (other / "thesis.tex").read_text() == "x"
    assert (model_dir / "model.safetensors").is_file()


def test_stages_are_stages():
    with pytest.raises(ValueError, match="stages: got none, expected stages such as"):
        Pipeline([])
    with pytest.raises(ValueError, match="stages: got str, expected stages such as"):
        Pipeline(["prune"])
