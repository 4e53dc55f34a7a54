"""llmkern demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmkern._progress import lines_every
from llmkern.cli._shared import console

# Between two lines of progress, where standard error is no terminal.
_SECONDS = 10.0


def demo(
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="Directory for the models and the report; replaced."),
    ] = Path("demo-out"),
) -> None:
    """Prune, quantize and distill the bundled model, and report what each stage bought and cost."""
    from llmkern.demo import run

    with lines_every(_SECONDS):
        run(output, console)
