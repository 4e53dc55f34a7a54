"""llmkern prune."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkern.cli import _options
from llmkern.cli._shared import (
    CHECKPOINT,
    DATA,
    RESUME,
    SOURCE,
    Device,
    DType,
    Model,
    Output,
    Overwrite,
    check_output,
    check_size,
    console,
    open_model,
    open_tokenizer,
    shaping,
    write_model,
)

if TYPE_CHECKING:
    from llmkern.prune import PruneMethod, PruneReport

_AMOUNT = "Amount"
_RULES = "PATTERN=SPARSITY, PATTERN=N:M or PATTERN=dense, by module name; repeatable."


def command() -> Callable[..., None]:
    """The command, with the options of all methods that there are."""
    return _options.with_options(prune, _verb().options())


def _verb() -> _options.Verb[PruneMethod]:
    import llmkern
    from llmkern.drive import DataOptions
    from llmkern.prune import METHODS

    panels = {
        **dict.fromkeys(("checkpoint", "resume"), None),
        **dict.fromkeys(("sparsity", "pattern", "ratio"), _AMOUNT),
        "calibration": DATA,
    }
    shared = _options.from_function(
        llmkern.prune,
        panels,
        pattern={"metavar": "N:M"},
        calibration=SOURCE,
        checkpoint=CHECKPOINT,
        resume=RESUME,
    )
    data = _options.from_dataclass(DataOptions, DATA)
    return _options.Verb(llmkern.prune, METHODS, [*shared, *data])


def prune(
    model_dir: Model,
    output: Output,
    rule: Annotated[list[str] | None, typer.Option(rich_help_panel=_AMOUNT, help=_RULES)] = None,
    dtype: DType = None,
    device: Device = None,
    overwrite: Overwrite = False,
    **options: Any,
) -> None:
    """Remove weights, neurons, heads or blocks of a model and save it as a plain model."""
    import llmkern
    from llmkern.pipeline import Prune

    check_output(output, overwrite, [model_dir], options)
    method = _verb().choose(options)
    rules = _rules(rule or [])
    stage = Prune(method.name, **shaping(options), **({"rules": rules} if rules else {}))
    check_size(stage, model_dir, None, dtype, output)
    tokenizer = open_tokenizer(model_dir)
    model = open_model(model_dir, dtype, device)
    report = llmkern.prune(
        model, method.name, tokenizer=tokenizer, rules=rules, progress=True, **options
    )
    finished = options.get("checkpoint")
    write_model(
        *(model, output, tokenizer, report),
        source=model_dir,
        overwrite=overwrite,
        finished=finished,
    )
    console.print(_summary(report, output))


def _summary(report: PruneReport, output: Path) -> str:
    if not (report.widths or report.removed_blocks):
        line = (
            f"{len(report.layers)} layers pruned in {report.seconds:.1f} s, {report.sparsity:.1%} of "
            f"their weights are zero, {len(report.kept)} left as they were, saved to {output}"
        )
        return "\n".join([*report.notes, line])
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
