"""The demo: the bundled model pruned, quantized and distilled, each stage measured, and a report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import llmkern
from llmkern import assets
from llmkern.assets.corpus import training_text
from llmkern.calibrate import load_tokens
from llmkern.distill import make_student
from llmkern.pipeline import Distill, Pipeline, PipelineReport, Prune, Quantize, Stage
from llmkern.pipeline.measure import measure

PROMPTS = ("def read_lines(path):\n", "class Queue:\n    def __init__(self, maxsize=0):\n")
# Small enough to be over in a few minutes on two cores without bfloat16 instructions.
SEQ_LEN = 256
WINDOWS = 32
# Without its third block, the one that matters least by both criteria of depth pruning.
LAYERS = [0, 1, 3]
TRAINING: dict[str, Any] = {"steps": 60, "lr": 2e-3, "batch_size": 8, "seq_len": SEQ_LEN}
CALIBRATION: dict[str, Any] = {"samples": 32, "seq_len": SEQ_LEN}


def run(output: Path, console: Console) -> None:
    """Run the pipeline on the bundled model, and the same student's training without a teacher.

    Args:
        output: directory for the models and the report; replaced on every run.
        console: where to print.
    """
    started = time.perf_counter()
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    source = assets.bundled_model_dir()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    original = llmkern.load(source, dtype=torch.float32)
    windows = load_tokens(assets.evaluation_text(), original, tokenizer, seq_len=SEQ_LEN)[:WINDOWS]
    text = output.with_name(f"{output.name}-text.txt")
    text.write_text(training_text(), encoding="utf-8")
    stages: list[Stage[Any]] = [
        Prune("glu", ratio=0.25, importance="obs", **CALIBRATION),
        Quantize("gptq", bits=4, group_size=128, **CALIBRATION),
        Distill("soft", student={"layers": LAYERS}, data=str(text), **_loss(0.5), **TRAINING),
        Quantize("gptq", bits=4, group_size=128, **CALIBRATION),
    ]
    report = Pipeline(stages).run(
        original,
        output=output,
        calibration=assets.calibration_text(),
        tokenizer=tokenizer,
        evaluation=windows,
        prompts=PROMPTS,
        overwrite=True,
        progress=True,
    )
    alone = _without_teacher(output / str(report.stages[2].directory), text, tokenizer)
    quality = measure(alone, windows, original, speed=False)["evaluation"]
    console.print(table(report))
    student = report.stages[3].evaluation
    console.print(
        f"\nthe same student, {TRAINING['steps']} steps: perplexity {student['perplexity']:.3f}, KL "
        f"{student['kl']:.4f} with the teacher; {quality['perplexity']:.3f}, {quality['kl']:.4f} without"
    )
    console.print(f"{PROMPTS[0]!r} goes on, after all stages:\n")
    console.print(report.stages[-1].generations[0], markup=False, highlight=False)
    console.print(
        f"\n{output / 'report.html'} has it all; {output} is the last model, {output / 'stages'} those "
        f"before it; {time.perf_counter() - started:.0f} s in all"
    )


def _loss(alpha: float) -> dict[str, Any]:
    return {"temperature": 1.0, "alpha": alpha}


def _without_teacher(directory: Path, text: Path, tokenizer: Any) -> Any:
    """The student as the pipeline made it, trained for the same steps on the text alone."""
    student = make_student(llmkern.load(directory, dtype=torch.float32), LAYERS)
    data: dict[str, Any] = {"data": text, "tokenizer": tokenizer, "progress": True}
    llmkern.distill(student, student, "soft", **data, **_loss(0.0), **TRAINING)
    return student


def table(report: PipelineReport) -> Table:
    """What each stage bought and cost."""
    # Without lines it fits 80 columns.
    title = "bundled model: what each stage bought and cost"
    shown = Table(title=title, box=None, padding=(0, 2, 0, 0))
    shown.add_column("model", no_wrap=True)
    for column in ("params", "MB", "perplexity", "KL", "top-1", "tokens/s", "time"):
        shown.add_column(column, justify="right")
    names = ("original", "pruned", "pruned + int4", "distilled student", "student + int4")
    for name, stage in zip(names, report.stages, strict=True):
        result = stage.evaluation
        first = result["kl"] is None
        shown.add_row(
            name,
            f"{stage.parameters / 1e6:.2f} M",
            f"{stage.disk_bytes / 1e6:.2f}",
            f"{result['perplexity']:.3f}",
            "–" if first else f"{result['kl']:.4f}",
            "–" if first else f"{result['top1_agreement']:.3f}",
            f"{result['decode_tokens_per_s']:.0f}",
            "–" if first else f"{stage.seconds:.0f} s",
        )
    return shown
