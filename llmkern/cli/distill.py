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
    "student_width",
    "dtype",
    "device",
    "overwrite",
)

# Methods that have a teacher answer prompts.
_ANSWERED = ("sequence", "in_context")


@app.command()
def distill(
    context: typer.Context,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write.")],
    teacher_dir: Annotated[
        str | None,
        typer.Argument(
            metavar="[TEACHER_DIR]",
            help="Directory of the teacher, packed or not; none where answers come from a file.",
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="soft, hidden, gkd, minillm, sequence or in_context.")
    ] = "soft",
    student: Annotated[
        str | None,
        typer.Option(help="Directory of the student; else one is made from the teacher."),
    ] = None,
    student_layers: Annotated[
        float | None,
        typer.Option(
            help="Made from the teacher: this fraction of its blocks; 0.5, or all with --student-width."
        ),
    ] = None,
    student_width: Annotated[
        float, typer.Option(help="Made from the teacher: this fraction of its MLPs' neurons.")
    ] = 1.0,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text file, token tensor (.pt, .safetensors) or dataset name; built-in text by default."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Most windows of the data to train on.")] = 4096,
    seq_len: SeqLen = None,
    alpha: Annotated[
        float, typer.Option(help="Weight of the teacher's logits; 0.5, for in_context 0.")
    ] = 0.5,
    temperature: Annotated[float, typer.Option(help="Of both softmaxes; 2, for gkd 1.")] = 2.0,
    divergence: Annotated[
        str, typer.Option(help="forward_kl, reverse_kl or jsd; forward_kl, for gkd jsd.")
    ] = "forward_kl",
    beta: Annotated[float, typer.Option(help="Of jsd.")] = 0.5,
    hidden_weight: Annotated[
        float, typer.Option(help="Method hidden: weight of the hidden states.")
    ] = 1.0,
    attention_weight: Annotated[
        float, typer.Option(help="Method hidden: weight of the attention maps.")
    ] = 0.0,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='Prompts for a model to answer: a line each, or .jsonl of {"prompt": ...}.'
        ),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            help="File that keeps the teacher's answers, OUTPUT.answers.jsonl by default; without "
            "--prompts, a .jsonl of prompts and answers to train on."
        ),
    ] = None,
    answers_per_prompt: Annotated[int, typer.Option(help="How many the teacher gives.")] = 1,
    answer_batch: Annotated[int, typer.Option(help="Prompts per forward of the teacher.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 128,
    sample_temperature: Annotated[
        float, typer.Option(help="Of the softmax that answers are drawn from; 0: the likeliest.")
    ] = 1.0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens of this probability together.")
    ] = 1.0,
    stop: Annotated[
        str | None, typer.Option(help="Text before which a teacher's answer ends.")
    ] = None,
    answer_pattern: Annotated[
        str | None,
        typer.Option(help="Regular expression: train on what its last match (group 1) holds."),
    ] = None,
    chat_template: Annotated[
        bool,
        typer.Option("--chat-template", help="Put prompts into the tokenizers' chat template."),
    ] = False,
    demonstrations: Annotated[
        Path | None,
        typer.Option(
            help="Method in_context: .jsonl of prompts and answers, examples for the teacher."
        ),
    ] = None,
    shots: Annotated[int, typer.Option(help="Method in_context: examples before each prompt.")] = 4,
    demonstration: Annotated[
        str | None, typer.Option(help="Method in_context: an example, with {prompt} and {answer}.")
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="Method in_context: what the teacher is asked, with {prompt}."),
    ] = None,
    prompt_len: Annotated[
        int | None,
        typer.Option(help="Methods gkd, minillm: without --prompts, tokens of a window; 32."),
    ] = None,
    on_policy: Annotated[
        float, typer.Option(help="Method gkd: fraction of the steps on the student's own samples.")
    ] = 0.5,
    teacher_mix: Annotated[
        float, typer.Option(help="Method minillm: share of the teacher in what is sampled from.")
    ] = 0.2,
    importance: Annotated[
        str, typer.Option(help="Method minillm: weights of each token or of the sequence.")
    ] = "token",
    max_weight: Annotated[float, typer.Option(help="Method minillm: largest of them.")] = 10.0,
    length_norm: Annotated[
        bool, typer.Option(help="Method minillm: rewards per token that earns them.")
    ] = True,
    lm_weight: Annotated[
        float, typer.Option(help="Method minillm: weight of the cross-entropy on the data.")
    ] = 1.0,
    refresh: Annotated[
        int, typer.Option(help="Method minillm: steps that train on the same samples.")
    ] = 1,
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

    given = given_options(context, _OWN)
    by_text = method == "sequence" and "prompts" not in given
    _check_directories(context, output, teacher_dir, student, by_text, overwrite)
    teacher = tokenizer = teacher_tokenizer = None
    if teacher_dir is not None:
        teacher, teacher_tokenizer = (
            open_model(teacher_dir, dtype, device),
            open_tokenizer(teacher_dir),
        )
    if student is None:
        layers = student_layers or (0.5 if student_width == 1 else 1.0)
        pupil = make_student(teacher, layers, width=student_width, tokenizer=teacher_tokenizer)
        tokenizer = teacher_tokenizer
    else:
        pupil, tokenizer = open_model(student, dtype, device), open_tokenizer(student)
    if "prompts" in given and "answers" not in given and method in _ANSWERED:
        given["answers"] = output.absolute().with_name(f"{output.absolute().name}.answers.jsonl")
    report = llmkern.distill(
        pupil,
        teacher,
        method,
        tokenizer=tokenizer or teacher_tokenizer,
        teacher_tokenizer=teacher_tokenizer,
        progress=True,
        **given,
    )
    llmkern.save(pupil, output, tokenizer or teacher_tokenizer, overwrite=overwrite)
    (output / "llmkern_report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    last = report.training.steps[-1].metrics
    for note in report.notes:
        console.print(note, highlight=False)
    console.print(
        f"{len(report.training.steps)} steps in {report.training.seconds:.1f} s, loss "
        f"{last['loss']:.4f}, saved to {output}"
    )


def _check_directories(
    context: typer.Context,
    output: Path,
    teacher_dir: str | None,
    student: str | None,
    by_text: bool,
    overwrite: bool,
) -> None:
    """Refuse directories that are missing, or that nothing would be done with.

    `by_text`: the student learns from a file of answers, for which no teacher is needed.
    """
    from llmkern.hf.save import check_target

    check_target(output.absolute(), overwrite)
    made = [n for n in ("student_layers", "student_width") if n in given_options(context, ())]
    if student is not None and made:
        raise ValueError(
            f"--student, --{made[0].replace('_', '-')}: got both, expected one of them"
        )
    if teacher_dir is None and not by_text:
        raise ValueError(
            "TEACHER_DIR: got none, expected a directory; it may be left out only where method "
            "sequence reads answers from a file (--answers without --prompts)"
        )
    if teacher_dir is None and student is None:
        raise ValueError("--student: got none and no TEACHER_DIR, expected one of them")
    if teacher_dir is not None and student is not None and by_text:
        raise ValueError(
            f"TEACHER_DIR: got {teacher_dir}, expected none: answers come from a file and the student "
            "from its own directory"
        )
