"""llmkern distill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from llmkern.cli.app import (
    Device,
    DType,
    SeqLen,
    app,
    console,
    given_options,
    open_model,
    open_tokenizer,
)

# Parameters of the command that are not those of `llmkern.distill`.
_OWN = (
    "teacher_dir",
    "output",
    "method",
    "student",
    "student_layers",
    "dtype",
    "device",
    "overwrite",
)


@app.command()
def distill(
    context: typer.Context,
    teacher_dir: Annotated[
        str, typer.Argument(metavar="TEACHER_DIR", help="Directory of the teacher, packed or not.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write.")],
    method: Annotated[str, typer.Option(help="soft or hidden.")] = "soft",
    student: Annotated[
        str | None,
        typer.Option(help="Directory of the student; else one is made from the teacher."),
    ] = None,
    student_layers: Annotated[
        float, typer.Option(help="Made from the teacher: this fraction of its blocks.")
    ] = 0.5,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text file, token tensor (.pt, .safetensors) or dataset name; built-in text by default."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Most windows to train on.")] = 4096,
    seq_len: SeqLen = None,
    alpha: Annotated[float, typer.Option(help="Weight of the teacher against the data.")] = 0.5,
    temperature: Annotated[float, typer.Option(help="Of both softmaxes.")] = 2.0,
    divergence: Annotated[str, typer.Option(help="forward_kl, reverse_kl or jsd.")] = "forward_kl",
    beta: Annotated[float, typer.Option(help="Of jsd.")] = 0.5,
    hidden_weight: Annotated[
        float, typer.Option(help="Method hidden: weight of the hidden states.")
    ] = 1.0,
    attention_weight: Annotated[
        float, typer.Option(help="Method hidden: weight of the attention maps.")
    ] = 0.0,
    steps: Annotated[int, typer.Option(help="Updates of the weights.")] = 500,
    lr: Annotated[float, typer.Option(help="Learning rate after the warm-up.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(help="Windows per forward and process.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Forwards per step.")] = 1,
    warmup: Annotated[float, typer.Option(help="Fraction of the steps with a rising lr.")] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="Decoupled, of matrices.")] = 0.0,
    optimizer: Annotated[str, typer.Option(help="adamw or lion.")] = "adamw",
    mixed_precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    seed: Annotated[int, typer.Option(help="Of the order of the windows.")] = 0,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Directory for the state of training.")
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 0,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint.")] = False,
    log_dir: Annotated[Path | None, typer.Option(help="Directory for TensorBoard.")] = None,
    dtype: DType = None,
    device: Device = None,
    overwrite: Annotated[
        bool, typer.Option(help="Replace a model that OUTPUT already holds.")
    ] = False,
) -> None:
    """Train a smaller model to predict what the teacher predicts, and save it as a plain model."""
    import llmkern
    from llmkern.distill import make_student
    from llmkern.hf.save import check_target

    check_target(output.absolute(), overwrite)
    if student is not None and "student_layers" in given_options(context, ()):
        raise ValueError("--student, --student-layers: got both, expected one of them")
    teacher = open_model(teacher_dir, dtype, device)
    tokenizer = open_tokenizer(student or teacher_dir)
    if student is None:
        pupil = make_student(teacher, student_layers)
    else:
        pupil = open_model(student, dtype, device)
    report = llmkern.distill(
        pupil,
        teacher,
        method,
        tokenizer=tokenizer,
        teacher_tokenizer=open_tokenizer(teacher_dir),
        progress=True,
        **given_options(context, _OWN),
    )
    llmkern.save(pupil, output, tokenizer, overwrite=overwrite)
    (output / "llmkern_report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    last = report.training.steps[-1].metrics
    console.print(
        f"{len(report.training.steps)} steps in {report.training.seconds:.1f} s, loss "
        f"{last['loss']:.4f}, saved to {output}"
    )
