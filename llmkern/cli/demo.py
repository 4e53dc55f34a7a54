"""llmkern demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmkern.cli._shared import console


def demo(
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="Directory for the models and the report; replaced."),
    ] = Path("demo-out"),
) -> None:
    """Prune, quantize and distill the bundled model, and report what each stage bought and cost."""
    from llmkern.demo import run

    run(output, console)
