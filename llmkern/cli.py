"""The llmkern command. Every error a user can cause is one line on stderr and a non-zero exit."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    name="llmkern",
    help="Smaller, faster language models on hand-written kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

Model = Annotated[
    str, typer.Argument(metavar="MODEL_DIR", help="Directory of a Hugging Face model.")
]
SeqLen = Annotated[
    int | None, typer.Option(help="Tokens per window; by default a token tensor's width, else 512.")
]
DType = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own by default.")
]
Device = Annotated[str | None, typer.Option(help="cuda or cpu; a GPU if there is one by default.")]


def main() -> NoReturn:
    """Entry point: run the command, and turn errors into one line (LLMKERN_LOG=debug shows all)."""
    level = os.environ.get("LLMKERN_LOG", "warning").upper()
    logging.basicConfig(level=getattr(logging, level, logging.WARNING))
    try:
        app()
    except Exception as error:
        if level == "DEBUG":
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"llmkern: error: {text}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


@app.command()
def env() -> None:
    """Print versions, processors, and which backend serves which op here."""
    from llmkern import env as environment

    for title, rows in (("versions", environment.versions()), ("hardware", environment.hardware())):
        table = Table(title=title, show_header=False, title_justify="left")
        for name, value in rows.items():
            table.add_row(name, value)
        console.print(table)
    table = Table(
        "op", "device", "backend", "serves", "why not", title="backends", title_justify="left"
    )
    for row in environment.serving():
        table.add_row(row.op, row.device, row.backend, "no" if row.reason else "yes", row.reason)
    console.print(table)


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
    tokenizer = _tokenizer(model_dir)
    model = _open(model_dir, dtype, device)
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
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result here too.")
    ] = None,
) -> None:
    """Measure perplexity, bytes of weights and speed, and closeness to a reference model."""
    from llmkern.evaluate import evaluate as run

    if (text is None) == (tokens is None):
        raise ValueError("--text, --tokens: got both or neither, expected exactly one of them")
    result = run(
        _open(model_dir, dtype, device),
        text or tokens,
        _tokenizer(model_dir),
        seq_len=seq_len,
        reference=_open(reference, dtype, device) if reference else None,
        progress=True,
    ).to_dict()
    table = Table(show_header=False)
    for name, value in result.items():
        table.add_row(name, f"{value:.6g}" if isinstance(value, float) else str(value))
    console.print(table)
    if json_file:
        json_file.write_text(json.dumps(result, indent=2) + "\n")


@app.command()
def generate(
    model_dir: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    dtype: DType = None,
    device: Device = None,
) -> None:
    """Continue a prompt."""
    import torch

    model = _open(model_dir, dtype, device)
    tokenizer = _tokenizer(model_dir)
    if tokenizer is None:
        raise ValueError(
            f"{model_dir}: got no tokenizer files, expected a model with its tokenizer"
        )
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    output = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        **sampling,
    )
    console.print(
        tokenizer.decode(output[0], skip_special_tokens=True), markup=False, highlight=False
    )


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Directory for the compressed models.")
    ] = Path("demo-out"),
) -> None:
    """Quantize the bundled model to 4 and 3 bits with RTN and GPTQ, and compare."""
    from llmkern.demo import run

    run(output, console)


def _open(model_dir: str, dtype: str | None, device: str | None) -> Any:
    """The model in `model_dir`, dense or compressed, on the device asked for."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    import llmkern

    disable_progress_bar()  # type: ignore[no-untyped-call]  # the command shows its own
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is not None and dtype not in kinds:
        raise ValueError(f"--dtype: got {dtype!r}, expected one of {', '.join(kinds)}")
    model: Any = llmkern.load(model_dir, dtype=kinds[dtype] if dtype else "auto")
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _tokenizer(model_dir: str) -> Any:
    """The tokenizer beside the model, or None where there is none."""
    from transformers import AutoTokenizer

    if not any(Path(model_dir).glob("tokenizer*")):
        return None
    return AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)


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
