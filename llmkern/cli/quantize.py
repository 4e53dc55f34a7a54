"""llmkern quantize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    data_options,
    open_model,
    open_tokenizer,
    shaping,
    write_model,
)

if TYPE_CHECKING:
    from llmkern.quantize import QuantizeMethod

_FORMAT = "Format"


def command() -> Callable[..., None]:
    """The command, with the options of all methods that there are."""
    return _options.with_options(quantize, _verb().options())


def _verb() -> _options.Verb[QuantizeMethod]:
    import llmkern
    from llmkern.drive import DataOptions
    from llmkern.quantize import METHODS

    panels = {
        **dict.fromkeys(("checkpoint", "resume"), None),
        **dict.fromkeys(("bits", "group_size"), _FORMAT),
        "calibration": DATA,
    }
    shared = _options.from_function(
        llmkern.quantize,
        panels,
        group_size={
            "kind": int,
            "help": "Weights per scale, -1: one scale per row; the method's own by default.",
            "default": "",
        },
        calibration=SOURCE,
        checkpoint=CHECKPOINT,
        resume=RESUME,
    )
    data = _options.from_dataclass(DataOptions, DATA)
    return _options.Verb(llmkern.quantize, METHODS, [*shared, _rule(METHODS), *data])


def _rule(methods: Sequence[QuantizeMethod]) -> _options.Option:
    """--rule, as the methods' formats are written."""
    names: dict[str, list[str]] = {}
    for method in methods:
        names.setdefault(method.formats.written, []).append(method.name)
    ways = ", ".join(f"PATTERN={how} ({', '.join(names[how])})" for how in names)
    return _options.Option(
        "rule", list[str], f"By module name: {ways} or PATTERN=dense.", panel=_FORMAT
    )


def quantize(
    model_dir: Model,
    output: Output,
    asymmetric: Annotated[
        bool | None, typer.Option(rich_help_panel=_FORMAT, help="Store zero points.")
    ] = None,
    dtype: DType = None,
    device: Device = None,
    overwrite: Overwrite = False,
    **options: Any,
) -> None:
    """Quantize a model's linear layers and save it for compressed-tensors or bitsandbytes."""
    import llmkern
    from llmkern.pipeline import Quantize

    check_output(output, overwrite, [model_dir], options)
    method = _verb().choose(options)
    _check_data(method, options)
    if asymmetric is not None:
        options["symmetric"] = not asymmetric
    if options.get("group_size") == -1:
        options["group_size"] = None
    rules = _rules(options.pop("rule", ()), method, options)
    stage = Quantize(method.name, rules=rules, **shaping(options))
    check_size(stage, model_dir, None, dtype, output)
    tokenizer = open_tokenizer(model_dir)
    model = open_model(model_dir, dtype, device)
    report = llmkern.quantize(
        model, method.name, rules=rules, tokenizer=tokenizer, progress=True, **options
    )
    finished = options.get("checkpoint")
    write_model(
        *(model, output, tokenizer, report),
        source=model_dir,
        overwrite=overwrite,
        finished=finished,
    )
    for note in report.notes:
        console.print(note, highlight=False)
    console.print(
        f"{len(report.layers)} layers quantized in {report.seconds:.1f} s, "
        f"{len(report.dense)} left dense, saved to {output}"
    )


def _check_data(method: QuantizeMethod, given: dict[str, Any]) -> None:
    """Refuse data for a method that reads none."""
    if method.work.needs(_options.settings_of(method, given)).tokens:
        return
    for name in data_options():
        if name in given:
            raise ValueError(
                f"{_options.flag(name)}: got {given[name]}, expected nothing: "
                f"--method {method.name} does not calibrate"
            )


def _rules(rules: Sequence[str], method: QuantizeMethod, given: dict[str, Any]) -> dict[str, Any]:
    """--rule options as the mapping that llmkern.quantize takes."""
    parsed: dict[str, Any] = {}
    for rule in rules:
        pattern, _, value = rule.rpartition("=")
        dense = value == "dense"
        fmt = None if dense or not pattern else method.formats.parse(value, given)
        if not pattern or (fmt is None and not dense):
            raise ValueError(
                f"--rule: got {rule!r}, expected PATTERN={method.formats.written} or PATTERN=dense"
            )
        parsed[pattern] = fmt
    return parsed
