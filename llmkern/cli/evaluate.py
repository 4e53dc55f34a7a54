"""llmkern eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from llmkern.cli.app import (
    Dense,
    Device,
    DType,
    Model,
    SeqLen,
    app,
    console,
    open_model,
    open_tokenizer,
)


@app.command("eval")
def evaluate(
    model_dir: Model,
    text: Annotated[Path | None, typer.Option(help="Text file to evaluate on.")] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="int64 [n, seq_len]: .pt, .safetensors.")
    ] = None,
    seq_len: SeqLen = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Model to compare with: adds KL divergence and top-1 agreement."),
    ] = None,
    dtype: DType = None,
    device: Device = None,
    dense: Dense = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result here too.")
    ] = None,
) -> None:
    """Measure perplexity, bytes of weights and speed, and closeness to a reference model."""
    from llmkern.evaluate import evaluate as run

    if (text is None) == (tokens is None):
        raise ValueError("--text, --tokens: got both or neither, expected exactly one of them")
    result = run(
        open_model(model_dir, dtype, device, sparse=not dense),
        text or tokens,
        open_tokenizer(model_dir),
        seq_len=seq_len,
        reference=open_model(reference, dtype, device, sparse=not dense) if reference else None,
        progress=True,
    ).to_dict()
    table = Table(show_header=False)
    for name, value in result.items():
        table.add_row(name, f"{value:.6g}" if isinstance(value, float) else str(value))
    console.print(table)
    if json_file:
        json_file.write_text(json.dumps(result, indent=2) + "\n")
