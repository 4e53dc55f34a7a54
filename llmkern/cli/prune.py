"""llmkern prune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkern.cli.app import (
    Checkpoint,
    Device,
    DType,
    Model,
    Resume,
    SeqLen,
    app,
    console,
    given_options,
    open_model,
    open_tokenizer,
)

if TYPE_CHECKING:
    from llmkern.prune import PruneReport

# Parameters of the command that are not those of `llmkern.prune`.
_OWN = ("model_dir", "output", "method", "rule", "dtype", "device", "overwrite")


@app.command()
def prune(
    context: typer.Context,
    model_dir: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write.")],
    method: Annotated[
        str,
        typer.Option(
            help="sparsegpt, wanda or magnitude; of structures: glu, mlp, heads, depth or taylor."
        ),
    ] = "sparsegpt",
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction of single weights to set to zero.")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(metavar="N:M", help="Keep n of every m weights of a row, as 2:4.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Fraction of whole structures to take out.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text file, token tensor (.pt, .safetensors) or dataset name; built-in text by default."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seq_len: SeqLen = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of windows.")] = 0,
    scope: Annotated[
        str | None,
        typer.Option(help="layer or row: which weights compete; the method's own by default."),
    ] = None,
    allocation: Annotated[
        str, typer.Option(help="uniform, or owl: blocks with fewer outlying weights lose more.")
    ] = "uniform",
    owl_threshold: Annotated[
        float | None, typer.Option(help="Outliers exceed so many times the mean score; 5.")
    ] = None,
    owl_lambda: Annotated[
        float | None, typer.Option(help="Spread of the sparsities around the one asked for; 0.08.")
    ] = None,
    damp: Annotated[
        float, typer.Option(help="Damping: fraction of the Hessian's mean diagonal.")
    ] = 0.01,
    act_order: Annotated[
        bool | None, typer.Option(help="Visit columns by descending activation energy.")
    ] = None,
    bias_compensation: Annotated[
        bool | None, typer.Option(help="Let biases take up the mean of what is removed.")
    ] = None,
    true_sequential: Annotated[
        bool | None, typer.Option(help="Calibrate layers on those before them in their block.")
    ] = None,
    target_params: Annotated[
        int | None, typer.Option(help="In place of --ratio: parameters that may be left.")
    ] = None,
    importance: Annotated[
        str | None, typer.Option(help="obs, activation or magnitude, for glu, mlp and heads.")
    ] = None,
    compensate: Annotated[
        bool | None, typer.Option(help="Adjust what is left after neurons or heads have gone.")
    ] = None,
    round_to: Annotated[
        int | None,
        typer.Option(help="Widths of MLPs are multiples of it; 256, 128 or 32 by itself."),
    ] = None,
    allow_uneven: Annotated[
        bool, typer.Option(help="A width of its own for each block: loads with llmkern only.")
    ] = False,
    keep_first: Annotated[
        int | None,
        typer.Option(help="Blocks left whole at the start, for depth and uneven widths."),
    ] = None,
    keep_last: Annotated[
        int | None, typer.Option(help="Blocks left whole at the end, for depth and uneven widths.")
    ] = None,
    blocks: Annotated[int | None, typer.Option(help="For depth: how many blocks go.")] = None,
    criterion: Annotated[str | None, typer.Option(help="For depth: cosine or perplexity.")] = None,
    iterative: Annotated[
        bool, typer.Option(help="For depth: score what is left anew after each block.")
    ] = False,
    taylor: Annotated[
        str | None,
        typer.Option(help="For taylor: param_first, param_second, param_mix or vectorize."),
    ] = None,
    parts: Annotated[str | None, typer.Option(help="For taylor: both, mlp or heads.")] = None,
    gradient_samples: Annotated[
        int | None, typer.Option(help="For taylor: windows whose gradient is taken.")
    ] = None,
    recovery: Annotated[
        str | None, typer.Option(help="Training afterwards: none, lora or full.")
    ] = None,
    recovery_steps: Annotated[int | None, typer.Option(help="Steps of that training.")] = None,
    recovery_lr: Annotated[float | None, typer.Option(help="Its peak learning rate.")] = None,
    recovery_rank: Annotated[int | None, typer.Option(help="Rank of LoRA.")] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            help="PATTERN=SPARSITY, PATTERN=N:M or PATTERN=dense, by module name; repeatable."
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    resume: Resume = False,
    dtype: DType = None,
    device: Device = None,
    overwrite: Annotated[
        bool, typer.Option(help="Replace a model that OUTPUT already holds.")
    ] = False,
) -> None:
    """Remove weights, neurons, heads or blocks of a model and save it as a plain model."""
    import llmkern
    from llmkern.drive import discard
    from llmkern.hf.save import check_target

    check_target(output.absolute(), overwrite)
    rules = _rules(rule or [])
    model = open_model(model_dir, dtype, device)
    tokenizer = open_tokenizer(model_dir)
    report = llmkern.prune(
        model,
        method,
        tokenizer=tokenizer,
        rules=rules,
        progress=True,
        **given_options(context, _OWN),
    )
    llmkern.save(model, output, tokenizer, overwrite=overwrite)
    if checkpoint is not None:
        discard(checkpoint)
    (output / "llmkern_report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    console.print(_summary(report, output))


def _summary(report: PruneReport, output: Path) -> str:
    if not (report.widths or report.removed_blocks):
        return (
            f"{len(report.layers)} layers pruned in {report.seconds:.1f} s, {report.sparsity:.1%} of "
            f"their weights are zero, {len(report.kept)} left as they were, saved to {output}"
        )
    removed = 1 - report.parameters_after / report.parameters_before
    lines = [
        f"{report.parameters_before:,} → {report.parameters_after:,} parameters ({removed:.1%} fewer) in "
        f"{report.seconds:.1f} s, saved to {output}"
    ]
    if report.recovery_loss:
        first, last = report.recovery_loss[0], report.recovery_loss[-1]
        lines.append(f"recovery: loss {first:.3f} → {last:.3f} nats per token")
    return "\n".join([*lines, *report.notes])


def _rules(rules: list[str]) -> dict[str, Any]:
    """--rule options as the mapping that llmkern.prune takes."""
    parsed: dict[str, Any] = {}
    for rule in rules:
        glob, equals, value = rule.rpartition("=")
        if not equals or not glob:
            raise ValueError(
                f"--rule: got {rule!r}, expected PATTERN=SPARSITY, PATTERN=N:M or PATTERN=dense"
            )
        try:
            parsed[glob] = None if value == "dense" else value if ":" in value else float(value)
        except ValueError:
            raise ValueError(
                f"--rule: got {rule!r}, expected a fraction, N:M or dense behind ="
            ) from None
    return parsed
