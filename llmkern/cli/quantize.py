"""llmkern quantize."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from llmkern.cli.app import Device, DType, Model, SeqLen, app, console, open_model, open_tokenizer

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
    method: Annotated[str, typer.Option(help="gptq or rtn.")] = "gptq",
    bits: Annotated[int, typer.Option(help="2, 3 or 4.")] = 4,
    group_size: Annotated[
        int, typer.Option(help="Weights per scale; -1: one scale per row.")
    ] = 128,
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
    dtype: DType = None,
    device: Device = None,
    overwrite: Annotated[
        bool, typer.Option(help="Replace a model that OUTPUT already holds.")
    ] = False,
) -> None:
    """Quantize a model's linear layers and save it as a compressed-tensors checkpoint."""
    import llmkern
    from llmkern.hf.save import check_target

    check_target(output.absolute(), overwrite)
    options: dict[str, Any] = {"clip_search": clip_search}
    if method == "rtn":
        for name in _CALIBRATED:
            source = context.get_parameter_source(name)
            if source is not None and source.name != "DEFAULT":
                raise ValueError(
                    f"--{name.replace('_', '-')}: got {context.params[name]}, expected nothing: "
                    "--method rtn does not calibrate"
                )
    else:
        options |= {name: context.params[name] for name in _CALIBRATED}
    tokenizer = open_tokenizer(model_dir)
    model = open_model(model_dir, dtype, device)
    report = llmkern.quantize(
        model,
        method,
        bits=bits,
        group_size=None if group_size == -1 else group_size,
        symmetric=not asymmetric,
        rules=_rules(rule or [], group_size, asymmetric),
        tokenizer=tokenizer,
        progress=True,
        **{name: value for name, value in options.items() if value is not None},
    )
    llmkern.save(model, output, tokenizer, overwrite=overwrite)
    (output / "llmkern_report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    console.print(
        f"{len(report.layers)} layers quantized in {report.seconds:.1f} s, "
        f"{len(report.dense)} left dense, saved to {output}"
    )


def _rules(rules: list[str], group_size: int, asymmetric: bool) -> dict[str, Any]:
    """--rule options as the mapping that llmkern.quantize takes."""
    from llmkern.formats.int4 import QuantFormat

    parsed: dict[str, Any] = {}
    for rule in rules:
        pattern, equals, value = rule.rpartition("=")
        width, _, size = value.partition(":")
        if value == "dense" and equals:
            parsed[pattern] = None
        elif equals and width.isdigit() and (not size or size.lstrip("-").isdigit()):
            group = int(size) if size else group_size
            parsed[pattern] = QuantFormat(
                int(width), None if group == -1 else group, not asymmetric
            )
        else:
            raise ValueError(
                f"--rule: got {rule!r}, expected PATTERN=BITS[:GROUP] or PATTERN=dense"
            )
    return parsed
