"""llmkern compare."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from llmkern.cli.app import (
    Device,
    DType,
    Model,
    SeqLen,
    app,
    console,
    notes,
    open_model,
    open_tokenizer,
)
from llmkern.cli.report_table import print_report


@app.command()
def compare(
    model_dir: Model,
    methods: Annotated[
        str | None,
        typer.Option(
            help='Comma between them: kinds ("quantize"), methods ("gptq") or rows ("gptq 4-bit"); all '
            "by default."
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Directory for report.html, .md and .json.")
    ] = Path("comparison"),
    calibration: Annotated[
        str | None,
        typer.Option(help="Text file, token tensor or dataset; by default a bundled text."),
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(help="The same, held out, to measure on; by default a bundled text."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seq_len: SeqLen = None,
    windows: Annotated[int, typer.Option(help="Most windows to measure on.")] = 64,
    steps: Annotated[int, typer.Option(help="Training steps of methods that train.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the choice of windows and of training.")] = 0,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="To continue in the report; repeatable. From the evaluation by default."),
    ] = None,
    speed: Annotated[bool, typer.Option(help="Measure tokens per second.")] = True,
    dtype: DType = None,
    device: Device = None,
) -> None:
    """Apply every technique to a model, one after the other, and compare size, speed and accuracy."""
    from llmkern.pipeline.compare import chosen_labels
    from llmkern.pipeline.compare import compare as run
    from llmkern.pipeline.measure import file_bytes
    from llmkern.report import write_report

    chosen = None if methods is None else [name.strip() for name in methods.split(",")]
    chosen_labels(chosen)  # before the model is read
    output.mkdir(parents=True, exist_ok=True)
    report = run(
        open_model(model_dir, dtype, device),
        said=lambda text: notes.print(text, markup=False, highlight=False),
        methods=chosen,
        calibration=calibration,
        evaluation=evaluation,
        tokenizer=open_tokenizer(model_dir),
        seq_len=seq_len,
        samples=samples,
        windows=windows,
        steps=steps,
        seed=seed,
        prompts=prompt or None,
        speed=speed,
        progress=True,
        # In another dtype than its files have, it is another size.
        disk=None if dtype else file_bytes(Path(model_dir)),
        scratch=output,
        name=model_dir,
        command=shlex.join(["llmkern", *sys.argv[1:]]),
    )
    paths = write_report(report, output)
    print_report(report)
    for label, reason in report.left_out.items():
        console.print(f"{label}: not applied: {reason}", markup=False, highlight=False)
    console.print(f"wrote {', '.join(map(str, paths))}", soft_wrap=True, highlight=False)
