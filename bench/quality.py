"""What compression costs in quality: KL to the original and perplexity, on the bundled model.

python bench/quality.py                                     pruning: single weights, structures
python bench/quality.py --suite quantize --only 3-bit --seeds 5
python bench/quality.py --order                             three orders of the stages, one final size
python bench/quality.py --json bench/results/quality-20261124.json

A suite is a table (see quality_variants.py). A seed chooses other calibration windows; shown are the
mean over the seeds and, for KL, the spread (largest minus smallest). Time is that of compressing alone.
The protocol, without which no such number means anything, is printed with every table and kept in the
JSON file; suites of that file which were not asked for stay as they are.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import _report
import quality_order
import torch
import typer
from quality_variants import DEFAULT, SUITES, Variant
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmkern
from llmkern._json import to_json
from llmkern.assets import bundled_model_dir, calibration_text, evaluation_text
from llmkern.calibrate import load_tokens

MODEL, CALIBRATION, EVALUATION = bundled_model_dir(), calibration_text(), evaluation_text()


def main(
    *,
    suite: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(SUITES)}; repeatable  [default: {', '.join(DEFAULT)}]"),
    ] = None,
    model_dir: Annotated[Path, typer.Option("--model")] = MODEL,
    calibration: Annotated[Path, typer.Option(help="text")] = CALIBRATION,
    text: Annotated[Path, typer.Option(help="text to evaluate on")] = EVALUATION,
    only: Annotated[list[str] | None, typer.Option(help="variants whose name holds this")] = None,
    seeds: int = 3,
    samples: int = 128,
    windows: Annotated[int, typer.Option(help="evaluation windows")] = 64,
    order: Annotated[bool, typer.Option("--order", help="orders of the stages instead")] = False,
    steps: Annotated[int, typer.Option(help="of distillation, with --order")] = 120,
    training: Annotated[
        Path | None, typer.Option(help="text to distill on, by default the bundled model's corpus")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Compress the model with every variant of the suites and compare with the original."""
    chosen = [] if order else suite or DEFAULT
    for name in chosen:
        if name not in SUITES:
            raise typer.BadParameter(f"got {name!r}, expected one of {', '.join(SUITES)}")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    reference = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    held_out = load_tokens(text, reference, tokenizer)[:windows]
    # Where nobody looks at it, such as in a log, a table is not squeezed into 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    records = json.loads(json_file.read_text()) if json_file and json_file.is_file() else {}
    original = llmkern.evaluate(reference, held_out, speed=False).perplexity
    for name in chosen:
        variants = [v for v in SUITES[name] if not only or any(part in v.name for part in only)]
        record: dict[str, Any] = {
            "model": model_dir.name,
            "perplexity": original,
            "protocol": protocol(text, held_out, calibration, samples, seeds),
            "run": _report.environment(on_gpu=False),
            "rows": [],
        }
        for variant in variants:
            data = {"calibration": calibration, "samples": samples, "tokenizer": tokenizer}
            runs = [
                measure(reference, held_out, variant, data | {"seed": seed})
                for seed in range(seeds if variant.calibrated else 1)
            ]
            record["rows"].append({"variant": variant.name, "runs": runs})
            console.print(f"{variant.name}: KL {statistics.mean(r['kl'] for r in runs):.5f}")
        console.print(table(name, record))
        records[name] = record
        keep(json_file, records)
    if order:
        record = {
            "model": model_dir.name,
            "perplexity": original,
            "protocol": protocol(text, held_out, calibration, samples, 1),
            "steps": steps,
            "run": _report.environment(on_gpu=False),
            "rows": [],
        }
        job = quality_order.Job(held_out, calibration, training, steps, samples)
        for name, stage in quality_order.run(reference, tokenizer, job):
            record["rows"].append({"variant": name, "run": quality_order.figures(stage)})
            console.print(f"{name}: KL {stage.evaluation['kl']:.5f}")
        console.print(quality_order.table(record))
        records["order"] = record
        keep(json_file, records)


def keep(json_file: Path | None, records: dict[str, Any]) -> None:
    """Write what has been measured so far, if a file was asked for."""
    if json_file is not None:
        json_file.write_text(to_json(records, indent=1) + "\n")


def protocol(text: Path, held_out: Tensor, calibration: Path, samples: int, seeds: int) -> str:
    """What was evaluated on and what was calibrated with, in one line."""
    window = held_out.shape[1]
    return (
        f"{held_out.numel()} held-out tokens of {text.name} in windows of {window}, float32; "
        f"calibrated on {samples} windows of {window} tokens of {calibration.name}, mean of "
        f"{seeds} choices of windows"
    )


def measure(
    reference: nn.Module, held_out: Tensor, variant: Variant, data: dict[str, Any]
) -> dict[str, float]:
    """Compress a copy of the reference and compare it with the reference."""
    model = copy.deepcopy(reference)
    driver = getattr(llmkern, variant.driver)
    report = driver(
        model, variant.method, **variant.options, **(data if variant.calibrated else {})
    )
    result = llmkern.evaluate(model, held_out, reference=reference, speed=False)
    assert result.kl is not None
    assert result.top1_agreement is not None
    return {
        "kl": result.kl,
        "perplexity": result.perplexity,
        "top1": result.top1_agreement,
        "parameters": sum(p.numel() for p in model.parameters()),
        "zeros": getattr(report, "sparsity", 0.0),
        "seconds": report.seconds,
    }


def table(name: str, record: dict[str, Any]) -> Table:
    """A suite's record; the protocol in its title."""
    title = (
        f"{name}, {record['model']}, perplexity {record['perplexity']:.3f} before: "
        f"{record['protocol']}"
    )
    shown = Table(title=title)
    shown.add_column("variant")
    for column in ("KL (nats)", "spread", "perplexity", "top-1", "parameters", "zeros", "seconds"):
        shown.add_column(column, justify="right")
    for row in record["rows"]:
        runs = row["runs"]
        mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
        kl = [run["kl"] for run in runs]
        shown.add_row(
            row["variant"],
            f"{mean['kl']:.5f}",
            f"{max(kl) - min(kl):.5f}",
            f"{mean['perplexity']:.3f}",
            f"{mean['top1']:.4f}",
            f"{mean['parameters'] / 1e6:.2f} M",
            f"{mean['zeros']:.1%}",
            f"{mean['seconds']:.1f}",
        )
    return shown


if __name__ == "__main__":
    typer.run(main)
