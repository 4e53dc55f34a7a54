"""llmkern compress."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from llmkern.cli.app import Device, DType, Model, app, console, parse_dtype
from llmkern.cli.report_table import print_report


@app.command()
def compress(
    model_dir: Model,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Directory to write: the model and the report.")
    ],
    recipe: Annotated[
        Path | None,
        typer.Option(help="YAML list of stages; prune, quantize and distill by default."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text file, token tensor (.pt, .safetensors) or dataset name, for all stages that need "
            "data; 'builtin' is the text that comes with llmkern."
        ),
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(help="The same, held out, to measure on; built-in text by default."),
    ] = None,
    evaluation_windows: Annotated[int, typer.Option(help="Most windows to measure on.")] = 64,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="To continue in the report; repeatable. From the evaluation by default."),
    ] = None,
    speed: Annotated[bool, typer.Option(help="Measure tokens per second.")] = True,
    sensitivity: Annotated[
        bool, typer.Option(help="Measure what each block's change costs alone.")
    ] = True,
    resume: Annotated[
        bool, typer.Option(help="Go on with the run of the same command that OUTPUT holds.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option(help="Delete the run or model that OUTPUT holds.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what it would need and refuse, and stop.")
    ] = False,
    dtype: DType = None,
    device: Device = None,
) -> None:
    """Prune, quantize and distill a model by a recipe, and report what each stage bought and cost."""
    from llmkern.pipeline import Pipeline, default_recipe, load_recipe

    pipeline = Pipeline(default_recipe() if recipe is None else load_recipe(recipe))
    if dry_run:
        found = pipeline.preflight(
            model_dir,
            output,
            calibration=calibration,
            dtype=parse_dtype(dtype),
            device=device,
        )
        console.print(found.table())
        found.refuse()
        return
    report = pipeline.run(
        model_dir,
        output,
        calibration=calibration,
        evaluation=evaluation,
        evaluation_windows=evaluation_windows,
        prompts=prompt or None,
        speed=speed,
        sensitivity=sensitivity,
        resume=resume,
        overwrite=overwrite,
        dtype=parse_dtype(dtype),
        device=device,
        progress=True,
        on_preflight=lambda found: console.print(found.table()),
        command=shlex.join(["llmkern", *sys.argv[1:]]),
    )
    print_report(report)
    console.print(f"saved to {output}, report: {output / 'report.html'}", soft_wrap=True)
