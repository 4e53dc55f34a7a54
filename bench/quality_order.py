"""The order of the stages: three orders of prune, quantize and distill that end with models of one size.

All end as 4-bit models with as many blocks and neurons; an order that ends with distillation trains a
dense student, which is then packed like the others. Calibration, training text, steps and seed are the
same.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from llmkern.assets.corpus import training_text
from llmkern.pipeline import Distill, Pipeline, Prune, Quantize, StageRecord

LAYERS, RATIO = (0, 1, 3), 0.25


@dataclass(frozen=True)
class Job:
    """What the orders share.

    Attributes:
        held_out: tokens to measure on.
        calibration: text.
        training: text to distill on; None is the bundled model's corpus.
        steps: of distillation.
        samples: windows of calibration.
        seed: of all stages.
    """

    held_out: Tensor
    calibration: Path
    training: Path | None
    steps: int
    samples: int
    seed: int = 0


def orders(job: Job, text: Path) -> dict[str, list[Any]]:
    """The stages of each order, by its name."""
    data = {"samples": job.samples, "seed": job.seed}
    prune = Prune("glu", ratio=RATIO, **data)
    pack = Quantize("gptq", bits=4, group_size=128, **data)
    distill = Distill(
        "soft",
        student={"layers": list(LAYERS)},
        data=str(text),
        alpha=0.5,
        temperature=1.0,
        steps=job.steps,
        lr=2e-3,
        seed=job.seed,
    )
    return {
        "prune → quantize → distill": [prune, pack, distill, pack],
        "quantize → prune → distill": [pack, prune, distill, pack],
        "distill → prune → quantize": [distill, prune, pack],
    }


def run(model: Any, tokenizer: Any, job: Job) -> Iterator[tuple[str, StageRecord]]:
    """Each order's name and the record of its last stage."""
    with tempfile.TemporaryDirectory() as folder:
        text = job.training
        if text is None:
            text = Path(folder) / "training.txt"
            text.write_text(training_text(), encoding="utf-8")
        for index, (name, stages) in enumerate(orders(job, text).items()):
            report = Pipeline(stages).run(
                model,
                output=Path(folder) / str(index),
                calibration=job.calibration,
                tokenizer=tokenizer,
                evaluation=job.held_out,
                speed=False,
                sensitivity=False,
                prompts=[],
            )
            yield name, report.stages[-1]


def figures(stage: StageRecord) -> dict[str, float]:
    """What is kept of an order's last stage."""
    result = stage.evaluation
    return {
        "kl": result["kl"],
        "perplexity": result["perplexity"],
        "top1": result["top1_agreement"],
        "parameters": stage.parameters,
        "file_bytes": stage.disk_bytes,
    }


def table(record: dict[str, Any]) -> Table:
    """A record's rows; the protocol in its title."""
    before = f"{record['model']}, perplexity {record['perplexity']:.3f} before"
    shown = Table(title=f"order, {before}: {record['protocol']}")
    shown.add_column("order")
    for column in ("KL (nats)", "perplexity", "top-1", "parameters", "file (MB)"):
        shown.add_column(column, justify="right")
    for row in record["rows"]:
        result = row["run"]
        shown.add_row(
            row["variant"],
            f"{result['kl']:.4f}",
            f"{result['perplexity']:.3f}",
            f"{result['top1']:.3f}",
            f"{result['parameters'] / 1e6:.2f} M",
            f"{result['file_bytes'] / 1e6:.2f}",
        )
    return shown
