"""bench/quality.py: every variant is one that the drivers know; a small run keeps its protocol."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from quality_variants import SUITES, Variant

from llmkern import prune, quantize
from llmkern.assets import calibration_text
from llmkern.drive import find_method, sort_options
from llmkern.prune import METHODS as PRUNE
from llmkern.quantize import METHODS as QUANTIZE

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = [variant for suite in SUITES.values() for variant in suite]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_variant_is_a_call_that_its_driver_takes(variant: Variant) -> None:
    methods: Any = {"quantize": QUANTIZE, "prune": PRUNE}[variant.driver]
    direct = inspect.signature({"quantize": quantize, "prune": prune}[variant.driver]).parameters
    options = {k: v for k, v in variant.options.items() if k not in direct}
    settings, _ = sort_options(find_method(methods, variant.method), options)
    assert dataclasses.asdict(settings).keys() >= options.keys()


def test_names_are_unique() -> None:
    for suite in SUITES.values():
        assert len({variant.name for variant in suite}) == len(suite)


@pytest.mark.slow
def test_record_holds_protocol_and_figures(tmp_path: Path) -> None:
    file = tmp_path / "quality.json"
    command = [sys.executable, str(ROOT / "bench/quality.py"), "--only", "magnitude 2:4"]
    command += ["--windows", "2", "--samples", "2", "--seeds", "1", "--json", str(file)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    record = json.loads(file.read_text())["prune"]
    assert "1024 held-out tokens of evaluation.txt in windows of 512" in record["protocol"]
    assert "calibrated on 2 windows of 512 tokens of calibration.txt" in record["protocol"]
    (row,) = record["rows"]
    (run,) = row["runs"]
    assert row["variant"] == "magnitude 2:4"
    assert run["kl"] > 0
    assert run["perplexity"] > record["perplexity"] > 1
    assert run["zeros"] == 0.5
    assert f"magnitude 2:4: KL {run['kl']:.5f}" in output
    assert "held-out" in output


@pytest.mark.slow
def test_orders_end_with_models_of_one_size(tmp_path: Path) -> None:
    file = tmp_path / "quality.json"
    command = [sys.executable, str(ROOT / "bench/quality.py"), "--order", "--steps", "1"]
    command += ["--windows", "2", "--samples", "2", "--json", str(file)]
    command += ["--training", str(calibration_text())]
    subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    record = json.loads(file.read_text())["order"]
    runs = {row["variant"]: row["run"] for row in record["rows"]}
    assert list(runs) == [
        "prune → quantize → distill",
        "quantize → prune → distill",
        "distill → prune → quantize",
    ]
    assert len({run["parameters"] for run in runs.values()}) == 1
    assert len({run["file_bytes"] // 1000 for run in runs.values()}) == 1
    assert len({run["kl"] for run in runs.values()}) == 3
