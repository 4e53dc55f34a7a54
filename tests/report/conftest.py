"""A report with everything in it, whose names would break a page that trusted them."""

from __future__ import annotations

from typing import Any

import pytest

from llmkern.report import PipelineReport, StageRecord

EVIL = "<script>alert('x')</script>"
LINEARS = ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")


def _figures(perplexity: float, kl: float | None, memory: int, decode: float) -> dict[str, Any]:
    return {
        "perplexity": perplexity,
        "kl": kl,
        "top1_agreement": None if kl is None else 1 - kl,
        "weight_bytes": memory,
        "prefill_tokens_per_s": 10 * decode,
        "decode_tokens_per_s": decode,
        "protocol": {"tokens": 4096, "window": 64, "compute_dtype": "bfloat16"},
    }


def _original() -> StageRecord:
    return StageRecord(
        name="original",
        stage="original",
        label="original",
        options={},
        seed=None,
        directory=None,
        parameters=2_890_000,
        disk_bytes=11_540_000,
        evaluation=_figures(9.0, None, 11_560_000, 100.0),
        seconds=0.0,
        peak_memory_bytes=None,
        generations=[f"    return 1  # {EVIL}\n"],
    )


def _prune() -> StageRecord:
    widths = [
        {"name": f"model.layers.{i}.mlp.down_proj", "relative_loss": 0.01 * (i + 1)}
        for i in range(2)
    ]
    return StageRecord(
        name="1-prune",
        stage="prune",
        label="prune glu 25 % | a",
        options={"method": "glu", "ratio": 0.25},
        seed=0,
        directory="1-prune",
        parameters=2_490_000,
        disk_bytes=9_960_000,
        evaluation=_figures(9.9, 0.1, 9_970_000, 110.0),
        seconds=9.3,
        peak_memory_bytes=812_000_000,
        driver={"tokens": 1024, "window": 64, "widths": widths, "recovery_loss": [3.0, 2.5]},
        sensitivity={"model.layers.0": 0.03, "model.layers.1": 0.05},
        generations=["    return 1  # but\n"],
    )


def _quantize() -> StageRecord:
    layers = [
        {"name": f"model.layers.{i}.{linear}", "relative_loss": 0.001 * (i + 1)}
        for i in range(2)
        for linear in LINEARS
    ]
    return StageRecord(
        name="2-quantize",
        stage="quantize",
        label="quantize $x$ 4-bit",
        options={"method": "gptq", "bits": 4},
        seed=0,
        directory="2-quantize",
        parameters=2_490_000,
        disk_bytes=3_010_000,
        evaluation=_figures(10.0, 0.12, 3_030_000, 150.0),
        seconds=118.0,
        peak_memory_bytes=None,
        driver={"tokens": 1024, "window": 64, "layers": layers},
        sensitivity={"model.layers.0": 0.02, "model.layers.1": 0.01},
        generations=["    return 2\n"],
    )


def _distill() -> StageRecord:
    steps = [{"step": i, "lr": 1e-3, "metrics": {"loss": 5 / i, "ce": 4 / i}} for i in range(1, 51)]
    return StageRecord(
        name="3-distill",
        stage="distill",
        label=f"distill {EVIL}",
        options={"method": "soft", "student": {"layers": 0.5}},
        seed=0,
        directory="3-distill",
        parameters=1_700_000,
        disk_bytes=6_810_000,
        evaluation=_figures(9.5, 0.08, 6_830_000, 300.0),
        seconds=42.0,
        peak_memory_bytes=1_200_000_000,
        driver={"training": {"steps": steps}},
        generations=["    pass\n"],
    )


@pytest.fixture
def evil() -> str:
    return EVIL


@pytest.fixture
def sample() -> PipelineReport:
    """Original, prune, quantize and distill, with every kind of figure."""
    stages = [_original(), _prune(), _quantize(), _distill()]
    return PipelineReport(
        title="tiny, smaller",
        command="llmkern compress tiny -o out --recipe recipe.yaml",
        model=f"models/{EVIL}",
        recipe=[{record.stage: record.options} for record in stages[1:]],
        versions={"llmkern": "0.1.0", "torch": "2.13.0"},
        hardware={"cpu": "x86_64, 2 cores", "gpus": "none"},
        prompts=["def f():\n```\n"],
        warnings=[f"an order that costs quality {EVIL}"],
        stages=stages,
    )
