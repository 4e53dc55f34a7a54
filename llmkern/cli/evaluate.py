"""llmkern eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from llmkern.cli.app import (
    Dense,
    Device,
    DType,
    Model,
    SeqLen,
    app,
    console,
    given_options,
    open_model,
    open_tokenizer,
)

_FOR_TEXT = {"text", "tokens", "seq_len", "reference"}
_FOR_TASKS = {"limit", "num_fewshot", "batch_size", "include_path"}


@app.command("eval")
def evaluate(
    context: typer.Context,
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
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Benchmarks of lm_eval in place of a text, comma between them: hellaswag,arc_easy."
        ),
    ] = None,
    limit: Annotated[
        float | None, typer.Option(help="With --tasks: questions per task, or a fraction of them.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="With --tasks: examples before each question.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="With --tasks: texts per forward.")] = 8,
    include_path: Annotated[
        Path | None, typer.Option(help="With --tasks: directory with tasks of your own (YAML).")
    ] = None,
) -> None:
    """Measure perplexity, bytes of weights and speed, and closeness to a reference; or benchmarks."""
    from llmkern.evaluate import evaluate as run

    given = given_options(context, ())
    wrong = _FOR_TEXT if tasks is not None else _FOR_TASKS
    for name in wrong & given.keys():
        where = "without" if tasks is not None else "with"
        raise ValueError(
            f"--{name.replace('_', '-')}: got {given[name]}, expected it only {where} --tasks"
        )
    if tasks is not None:
        _run_tasks(context.params)
        return
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


def _run_tasks(options: dict[str, Any]) -> None:
    """Hand the model over to lm_eval, and print its figures."""
    from llmkern.evaluate.lm_eval import Tasks, figures

    names = [name.strip() for name in options["tasks"].split(",") if name.strip()]
    found = Tasks(names, options["include_path"])  # before the model is read
    model_dir = options["model_dir"]
    answer = found.run(
        open_model(model_dir, options["dtype"], options["device"], sparse=not options["dense"]),
        open_tokenizer(model_dir),
        num_fewshot=options["num_fewshot"],
        limit=options["limit"],
        batch_size=options["batch_size"],
    )
    table = Table("task", "metric", header_style="bold")
    for column in ("value", "± error", "shots", "questions"):
        table.add_column(column, justify="right")
    for task, metric, value, error in figures(answer):
        asked = answer.get("n-samples", {}).get(task, {}).get("effective", "")
        table.add_row(
            escape(task),
            escape(metric),
            f"{value:.4f}" if isinstance(value, float) else str(value),
            "" if error is None else f"{error:.4f}",
            str(answer.get("n-shot", {}).get(task, "")),
            str(asked),
        )
    console.print(table)
    if options["json_file"]:
        text = json.dumps(answer, indent=2, default=str)
        options["json_file"].write_text(text + "\n")
