"""llmkern quantize."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

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

# Options of `quantize` that a method without calibration has no use for.
_CALIBRATED = (
    "calibration",
    "samples",
    "seq_len",
    "seed",
    "damp",
    "act_order",
    "group_scales",
    "true_sequential",
    "keep_zeros",
)


@app.command()
def quantize(
    context: typer.Context,
    model_dir: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write.")],
    method: Annotated[str, typer.Option(help="gptq, rtn, nf4 or fp4.")] = "gptq",
    bits: Annotated[int, typer.Option(help="2, 3 or 4.")] = 4,
    group_size: Annotated[
        int | None,
        typer.Option(help="Weights per scale, 128 (nf4, fp4: 64); -1: one scale per row."),
    ] = None,
    asymmetric: Annotated[bool, typer.Option(help="Store zero points.")] = False,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text file, token tensor (.pt, .safetensors) or dataset name; built-in text by default."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seq_len: SeqLen = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of windows.")] = 0,
    damp: Annotated[
        float, typer.Option(help="Damping: fraction of the Hessian's mean diagonal.")
    ] = 0.01,
    act_order: Annotated[
        bool | None, typer.Option(help="Visit columns by descending activation energy.")
    ] = None,
    group_scales: Annotated[str | None, typer.Option(help="static or dynamic.")] = None,
    clip_search: Annotated[
        bool | None, typer.Option(help="Search each group's clipping range.")
    ] = None,
    true_sequential: Annotated[
        bool | None, typer.Option(help="Calibrate layers on those before them in their block.")
    ] = None,
    keep_zeros: Annotated[
        bool | None,
        typer.Option(help="Keep exact zeros zero; by default in layers that have been pruned."),
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            help="PATTERN=BITS, PATTERN=BITS:GROUP or PATTERN=dense, by module name; repeatable."
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
    """Quantize a model's linear layers and save it for compressed-tensors (nf4, fp4: bitsandbytes)."""
    import llmkern
    from llmkern.drive import discard
    from llmkern.hf.save import check_target

    check_target(output.absolute(), overwrite)
    options: dict[str, Any] = {"clip_search": clip_search}
    if method in ("rtn", "nf4", "fp4"):
        given = given_options(context, ())
        for name in _CALIBRATED:
            if name in given:
                raise ValueError(
                    f"--{name.replace('_', '-')}: got {given[name]}, expected nothing: "
                    f"--method {method} does not calibrate"
                )
    else:
        options |= {name: context.params[name] for name in _CALIBRATED}
    tokenizer = open_tokenizer(model_dir)
    model = open_model(model_dir, dtype, device)
    report = llmkern.quantize(
        model,
        method,
        bits=bits,
        group_size="auto" if group_size is None else None if group_size == -1 else group_size,
        symmetric=not asymmetric,
        rules=_rules(rule or [], method, group_size, asymmetric),
        tokenizer=tokenizer,
        progress=True,
        checkpoint=checkpoint,
        resume=resume,
        **{name: value for name, value in options.items() if value is not None},
    )
    llmkern.save(model, output, tokenizer, overwrite=overwrite)
    if checkpoint is not None:
        discard(checkpoint)
    (output / "llmkern_report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    console.print(
        f"{len(report.layers)} layers quantized in {report.seconds:.1f} s, "
        f"{len(report.dense)} left dense, saved to {output}"
    )


def _rules(
    rules: list[str], method: str, group_size: int | None, asymmetric: bool
) -> dict[str, Any]:
    """--rule options as the mapping that llmkern.quantize takes."""
    from llmkern.formats.int4 import QuantFormat
    from llmkern.formats.lut4 import LutFormat

    parsed: dict[str, Any] = {}
    for rule in rules:
        pattern, equals, value = rule.rpartition("=")
        width, _, size = value.partition(":")
        if value == "dense" and equals:
            parsed[pattern] = None
        elif equals and width == "4" and size.isdigit() and method in ("nf4", "fp4"):
            parsed[pattern] = LutFormat(method, int(size))
        elif (
            equals
            and width.isdigit()
            and (not size or size.lstrip("-").isdigit())
            and method not in ("nf4", "fp4")
        ):
            group = int(size) if size else group_size or 128
            parsed[pattern] = QuantFormat(
                int(width), None if group == -1 else group, not asymmetric
            )
        else:
            wanted = "4:BLOCK" if method in ("nf4", "fp4") else "BITS[:GROUP]"
            raise ValueError(f"--rule: got {rule!r}, expected PATTERN={wanted} or PATTERN=dense")
    return parsed
