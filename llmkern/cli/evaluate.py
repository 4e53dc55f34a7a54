"""llmkern eval."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from llmkern._dtypes import overflow_hint
from llmkern.cli import _options
from llmkern.cli._shared import (
    Dense,
    Device,
    DType,
    Model,
    SeqLen,
    check_file,
    check_head,
    console,
    notes,
    open_model,
    open_tokenizer,
    write_json,
)

if TYPE_CHECKING:
    from llmkern.evaluate.lm_eval import Tasks

_BENCHMARKS = "Benchmarks"


def command() -> Callable[..., None]:
    """The command, with the options of benchmarks."""
    from llmkern.evaluate.lm_eval import Tasks

    panels = dict.fromkeys(("limit", "num_fewshot", "batch_size"), _BENCHMARKS)
    return _options.with_options(evaluate, _options.from_function(Tasks.run, panels))


def evaluate(
    model_dir: Model,
    text: Annotated[
        str | None,
        typer.Option(
            help="To evaluate on: text, rows (.jsonl, .csv, .parquet), a directory or a dataset's name."
        ),
    ] = None,
    text_field: Annotated[
        str | None,
        typer.Option(help="Field of the rows that holds their text; chosen, and said, by default."),
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(help=escape("int64 [n, seq_len]: .pt, .safetensors."))
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
            rich_help_panel=_BENCHMARKS,
            help="Of lm_eval, in place of a text, comma between them: hellaswag,arc_easy.",
        ),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(rich_help_panel=_BENCHMARKS, help="Directory with tasks of your own (YAML)."),
    ] = None,
    **options: Any,
) -> None:
    """Measure perplexity, bytes of weights and speed, and closeness to a reference; or benchmarks."""
    from llmkern.evaluate import evaluate as run

    for_text = {"text": text, "tokens": tokens, "seq_len": seq_len, "reference": reference}
    for_text["text_field"] = text_field
    for_tasks = {**options, "include_path": include_path}
    for name, value in (for_tasks if tasks is None else for_text).items():
        if value is not None:
            where = "with" if tasks is None else "without"
            raise ValueError(
                f"{_options.flag(name)}: got {value}, expected it only {where} --tasks"
            )

    if tasks is None and (text is None) == (tokens is None):
        raise ValueError("--text, --tokens: got both or neither, expected exactly one of them")
    check_file(json_file, "--json")
    found = None if tasks is None else _find_tasks(tasks, include_path)
    for directory in (model_dir, reference):
        check_head(directory)
    tokenizer = open_tokenizer(model_dir)
    reference_tokenizer = open_tokenizer(reference) if reference else None

    def opened(directory: str) -> Any:
        return open_model(directory, dtype, device, sparse=not dense)

    if found is not None:
        _show_tasks(found.run(opened(model_dir), tokenizer, **options), json_file)
        return
    model = opened(model_dir)
    result = run(
        model,
        text or tokens,
        tokenizer,
        seq_len=seq_len,
        text_field=text_field,
        reference=opened(reference) if reference else None,
        reference_tokenizer=reference_tokenizer,
        progress=True,
    ).to_dict()
    if math.isnan(result["perplexity"]):
        hint = overflow_hint(next(model.parameters()).dtype)
        notes.print(f"{model_dir}: its logits hold NaN{hint}", highlight=False)
    table = Table(show_header=False)
    for name, value in result.items():
        table.add_row(name, f"{value:.6g}" if isinstance(value, float) else str(value))
    console.print(table)
    if json_file:
        write_json(json_file, result)


def _find_tasks(tasks: str, include_path: Path | None) -> Tasks:
    """The benchmarks that --tasks names."""
    from llmkern.evaluate.lm_eval import Tasks

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    return Tasks(names, include_path)


def _show_tasks(answer: dict[str, Any], json_file: Path | None) -> None:
    """Print the figures of lm_eval, and write all of its answer."""
    from llmkern.evaluate.lm_eval import figures

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
    if json_file:
        write_json(json_file, answer)
