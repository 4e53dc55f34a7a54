"""llmkern distill."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkern.cli import _options
from llmkern.cli._shared import (
    SOURCE,
    Device,
    DType,
    Output,
    Overwrite,
    check_output,
    check_size,
    console,
    open_model,
    open_tokenizer,
    write_model,
)

if TYPE_CHECKING:
    from llmkern.distill import DistillMethod

_STUDENT = "Student"
_DATA = "Data"
_TRAINING = "Training"
_NOT_OF_SHAPES = (
    *("data", "text_field", "samples", "seq_len"),
    *("checkpoint", "resume", "log_dir"),
)
_ANSWERS = {
    "help": "File that keeps the teacher's answers, OUTPUT.answers.jsonl by default; without --prompts, "
    "a .jsonl of prompts and answers to train on."
}


def command() -> Callable[..., None]:
    """The command, with the options of all methods that there are."""
    return _options.with_options(distill, _verb().options())


def _verb() -> _options.Verb[DistillMethod]:
    import llmkern
    from llmkern.distill import METHODS
    from llmkern.train import TrainOptions

    panels = {
        **dict.fromkeys(("data", "samples", "seq_len", "text_field"), _DATA),
        "keep_zeros": _TRAINING,
    }
    shared = _options.from_function(llmkern.distill, panels, data=SOURCE)
    training = _options.from_dataclass(TrainOptions, _TRAINING)
    return _options.Verb(llmkern.distill, METHODS, [*shared, *training], answers=_ANSWERS)


def distill(
    output: Output,
    teacher_dir: Annotated[
        str | None,
        typer.Argument(
            metavar="[TEACHER_DIR]",
            help="Directory of the teacher, packed or not; none where answers come from a file.",
        ),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_STUDENT,
            help="Directory of the student; else one is made from the teacher.",
        ),
    ] = None,
    student_layers: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_STUDENT,
            help="Made from the teacher: this fraction of its blocks; 0.5, or all with "
            "--student-width.",
        ),
    ] = None,
    student_width: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_STUDENT,
            help="Made from the teacher: this fraction of its MLPs' neurons; all by default.",
        ),
    ] = None,
    dtype: DType = None,
    device: Device = None,
    overwrite: Overwrite = False,
    **options: Any,
) -> None:
    """Train a smaller model to predict what the teacher predicts, and save it as a plain model."""
    import llmkern
    from llmkern.distill import make_student
    from llmkern.pipeline import Distill

    method = _verb().choose(options)
    made = {"student_layers": student_layers, "student_width": student_width}
    needs_teacher = method.needs_teacher(_options.settings_of(method, options))
    _check_models(teacher_dir, student, made, needs_teacher)
    if "prompts" in options and "answers" in _options.option_names(method):
        kept = output.absolute().with_name(f"{output.absolute().name}.answers.jsonl")
        options.setdefault("answers", kept)
    check_output(output, overwrite, [teacher_dir, student], options)
    source = str(student or teacher_dir)
    width = 1.0 if student_width is None else student_width
    layers = student_layers or (0.5 if width == 1 else 1.0)
    shaping = {name: value for name, value in options.items() if name not in _NOT_OF_SHAPES}
    kind = "current" if student is not None else {"layers": layers, "width": width}
    stage = Distill(method.name, student=kind, **shaping)
    check_size(stage, source, teacher_dir, dtype, output)
    teacher_tokenizer = None if teacher_dir is None else open_tokenizer(teacher_dir)
    tokenizer = None if student is None else open_tokenizer(student)
    teacher = None if teacher_dir is None else open_model(teacher_dir, dtype, device)
    if student is None:
        pupil = make_student(teacher, layers, width=width, tokenizer=teacher_tokenizer)
    else:
        pupil = open_model(student, dtype, device)
    report = llmkern.distill(
        pupil,
        teacher,
        method.name,
        tokenizer=tokenizer or teacher_tokenizer,
        teacher_tokenizer=teacher_tokenizer,
        progress=True,
        **options,
    )
    write_model(
        *(pupil, output, tokenizer or teacher_tokenizer, report),
        source=source,
        overwrite=overwrite,
    )
    last = report.training.steps[-1].metrics
    for note in report.notes:
        console.print(note, highlight=False)
    console.print(
        f"{len(report.training.steps)} steps in {report.training.seconds:.1f} s, loss "
        f"{last['loss']:.4f}, saved to {output}"
    )


def _check_models(
    teacher_dir: str | None, student: str | None, made: dict[str, float | None], needed: bool
) -> None:
    """Refuse directories that are missing, or that nothing would be done with.

    Args:
        teacher_dir, student: as given.
        made: how a student is to be made from the teacher, as far as that was given.
        needed: a teacher is; without one the student learns from a file of answers.
    """
    both = [_options.flag(name) for name, value in made.items() if value is not None]
    if student is not None and both:
        raise ValueError(f"--student, {both[0]}: got both, expected one of them")
    if teacher_dir is None and needed:
        raise ValueError(
            "TEACHER_DIR: got none, expected a directory; it may be left out only where a method reads "
            "answers from a file and nothing else (--answers without --prompts)"
        )
    if teacher_dir is None and student is None:
        raise ValueError("--student: got none and no TEACHER_DIR, expected one of them")
    if teacher_dir is not None and student is not None and not needed:
        raise ValueError(
            f"TEACHER_DIR: got {teacher_dir}, expected none: answers come from a file and the student "
            "from its own directory"
        )
