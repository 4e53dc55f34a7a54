"""llmkern compress."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from llmkern.cli import _options
from llmkern.cli._shared import EVALUATION, PROMPT, Device, DType, Model, console, parse_dtype
from llmkern.cli.report_table import print_report

_CALIBRATION = {
    "help": "Text, rows (.jsonl, .csv, .parquet) or tokens (.pt, .safetensors), a directory or a "
    "dataset's name, for all stages that need data; 'builtin' is the text that comes with llmkern."
}


def command() -> Callable[..., None]:
    """The command, with the options of a run."""
    from llmkern.pipeline import Pipeline, RunOptions

    run = _options.from_function(
        Pipeline.run,
        dict.fromkeys(("resume", "overwrite")),
        resume={"help": "Go on with the run of the same command that OUTPUT holds."},
        overwrite={"help": "Delete the run or model that OUTPUT holds."},
    )
    names = ("calibration", "evaluation", "evaluation_windows", "text_field", "prompts")
    measured = _options.from_dataclass(
        RunOptions,
        dict.fromkeys((*names, "speed", "sensitivity")),
        calibration=_CALIBRATION,
        evaluation=EVALUATION,
        prompts=PROMPT,
    )
    return _options.with_options(compress, [*measured, *run])


def compress(
    model_dir: Model,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Directory to write: the model and the report.")
    ],
    recipe: Annotated[
        Path | None,
        typer.Option(help="YAML list of stages; prune, quantize and distill by default."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what it would need and refuse, and stop.")
    ] = False,
    dtype: DType = None,
    device: Device = None,
    **options: Any,
) -> None:
    """Prune, quantize and distill a model by a recipe, and report what each stage bought and cost."""
    from llmkern.pipeline import Pipeline, default_recipe, load_recipe

    pipeline = Pipeline(default_recipe() if recipe is None else load_recipe(recipe))
    if dry_run:
        found = pipeline.preflight(
            model_dir,
            output,
            calibration=options.get("calibration"),
            text_field=options.get("text_field"),
            dtype=parse_dtype(dtype),
            device=device,
        )
        console.print(found.table())
        found.refuse()
        return
    report = pipeline.run(
        model_dir,
        output,
        dtype=parse_dtype(dtype),
        device=device,
        progress=True,
        on_preflight=lambda found: console.print(found.table()),
        command=shlex.join(["llmkern", *sys.argv[1:]]),
        **options,
    )
    print_report(report)
    console.print(f"saved to {output}, report: {output / 'report.html'}", soft_wrap=True)
