"""llmkern prune with methods that take whole structures out of the bundled model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from llmkern import assets

MODEL = str(assets.bundled_model_dir())
DATA = ["--calibration", str(assets.calibration_text()), "--samples", "4", "--seq-len", "64"]

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "config"),
    [
        (["--method", "glu", "--ratio", "0.25", "--importance", "obs"], {"intermediate_size": 384}),
        (
            ["--method", "mlp", "--target-params", "2600000", "--no-compensate"],
            {"intermediate_size": 416},
        ),
        (["--method", "heads", "--ratio", "0.5"], {"num_key_value_heads": 1}),
        (
            ["--method", "depth", "--blocks", "1", "--criterion", "perplexity", "--iterative"],
            {"num_hidden_layers": 3},
        ),
        (
            ["--method", "taylor", "--ratio", "0.25", "--parts", "mlp", "--taylor", "param_mix"],
            {"intermediate_size": 384},
        ),
    ],
    ids=["glu", "mlp", "heads", "depth", "taylor"],
)
def test_pruned_model_is_a_plain_one(
    run: Run, tmp_path: Path, options: list[str], config: dict[str, int]
) -> None:
    out = tmp_path / "out"
    code, text, err = run("prune", MODEL, "-o", out, *options, *DATA)
    assert code == 0, err
    written = json.loads((out / "config.json").read_text())
    assert config.items() <= written.items()
    assert "fewer" in text
    report = json.loads((out / "llmkern_report.json").read_text())
    assert report["parameters_after"] < report["parameters_before"]
    assert report["notes"]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.num_parameters() == report["parameters_after"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "glu"], "ratio, target_params: got none of them"),
        (["--method", "glu", "--ratio", "1.5"], "ratio: got 1.5, expected a fraction in [0, 1)"),
        (
            ["--method", "depth", "--blocks", "1", "--importance", "obs"],
            "--importance: got obs, expected nothing: --method depth has no such option",
        ),
        (["--method", "glu", "--ratio", "0.5", "--rule", "*=0.5"], "rules: unknown"),
    ],
)
def test_mistake_is_one_line(run: Run, tmp_path: Path, options: list[str], message: str) -> None:
    code, _, err = run("prune", MODEL, "-o", tmp_path / "out", *options)
    assert code == 1
    assert message in err
    assert not (tmp_path / "out").exists()
