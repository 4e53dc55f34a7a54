"""llmkern compare."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from llmkern._progress import note
from llmkern.cli import _options
from llmkern.cli._shared import (
    EVALUATION,
    PROMPT,
    SOURCE,
    Device,
    DType,
    Model,
    check_head,
    console,
    open_model,
    open_tokenizer,
)
from llmkern.cli.report_table import print_report

_MADE = (
    *("calibration", "evaluation", "text_field", "samples", "seq_len", "windows"),
    *("steps", "seed", "prompts", "speed"),
)


def command() -> Callable[..., None]:
    """The command, with the options of a comparison."""
    from llmkern.pipeline.compare import CompareOptions

    made = _options.from_dataclass(
        CompareOptions,
        dict.fromkeys(_MADE),
        calibration=SOURCE,
        evaluation=EVALUATION,
        prompts=PROMPT,
    )
    return _options.with_options(compare, made)


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
    dtype: DType = None,
    device: Device = None,
    **options: Any,
) -> None:
    """Apply every technique to a model, one after the other, and compare size, speed and accuracy."""
    from llmkern._files import check_writable
    from llmkern.pipeline.compare import chosen_labels
    from llmkern.pipeline.compare import compare as run
    from llmkern.pipeline.measure import file_bytes
    from llmkern.report import write_report

    chosen = None if methods is None else [name.strip() for name in methods.split(",")]
    chosen_labels(chosen)  # before the model is read
    if output.exists() and not output.is_dir():
        raise FileExistsError(
            f"--output: got the file {output}, expected a directory for the report"
        )
    check_writable(output / "report.html", "--output")
    check_head(model_dir)
    tokenizer = open_tokenizer(model_dir)
    output.mkdir(parents=True, exist_ok=True)
    report = run(
        open_model(model_dir, dtype, device),
        said=note,
        methods=chosen,
        tokenizer=tokenizer,
        progress=True,
        # In another dtype than its files have, it is another size.
        disk=None if dtype else file_bytes(Path(model_dir)),
        scratch=output,
        name=model_dir,
        command=shlex.join(["llmkern", *sys.argv[1:]]),
        **options,
    )
    print_report(report)
    for label, reason in report.left_out.items():
        console.print(f"{label}: not applied: {reason}", markup=False, highlight=False)
    paths = write_report(report, output)
    console.print(f"wrote {', '.join(map(str, paths))}", soft_wrap=True, highlight=False)
