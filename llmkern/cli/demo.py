"""llmkern demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmkern.cli.app import app, console


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Directory for the compressed models.")
    ] = Path("demo-out"),
) -> None:
    """Quantize the bundled model to 4 and 3 bits with RTN and GPTQ, and compare."""
    from llmkern.demo import run

    run(output, console)
