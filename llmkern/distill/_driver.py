"""`distill`: checks, what the method makes of the models and the data, and the training."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkern._dtypes import overflow_hint
from llmkern.calibrate.data import Source
from llmkern.distill import gkd, hidden, in_context, minillm, sequence, soft
from llmkern.distill._method import DistillMethod
from llmkern.distill._plan import DistillJob
from llmkern.distill._student import is_dense
from llmkern.drive import find_method, sort_options
from llmkern.masks import keep_masks, pruned_layers
from llmkern.models import (
    check_writes_text,
    compute_note,
    computing_in,
    float32_parameters,
    whole_dtypes,
)
from llmkern.train import TrainOptions, TrainReport, fit


@dataclass
class DistillReport:
    """What `distill` did.

    Attributes:
        method: its name.
        options: the method's options, as used.
        windows, window: training windows (or rows, or prompts) and the tokens of the longest.
        training: loss of each step, seconds.
        notes: what was read, left out or cut.
    """

    method: str
    options: dict[str, Any]
    windows: int
    window: int
    training: TrainReport
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)


METHODS: list[DistillMethod] = [
    soft.METHOD,
    hidden.METHOD,
    gkd.METHOD,
    minillm.METHOD,
    sequence.METHOD,
    in_context.METHOD,
]

# Options that say where something lies, not what is done.
_PLACES = ("prompts", "answers", "demonstrations")


def distill(
    student: Any,
    teacher: Any,
    method: str = "soft",
    *,
    data: Source = None,
    tokenizer: Any = None,
    teacher_tokenizer: Any = None,
    seq_len: int | None = None,
    samples: int | None = None,
    text_field: str | None = None,
    progress: bool = False,
    keep_zeros: bool = True,
    **options: Any,
) -> DistillReport:
    """Train `student`, in place, to predict what `teacher` predicts.

    Args:
        student: a dense transformers causal language model (`make_student` makes one from the
            teacher). It is trained in float32; each parameter gets its own dtype back.
        teacher: any transformers causal language model, packed or pruned ones too; only read. None for
            "sequence" on answers that are in a file.
        method: "soft" (cross-entropy and a divergence of the logits), "hidden" (and hidden states,
            attention maps), "gkd" (a divergence of the logits on the student's own samples), "minillm"
            (reverse KL of these samples by policy gradient), "sequence" (the teacher's answers as
            text) or "in_context" (its answers in a context that the student does not get).
        data: text, path, tokens or dataset (see `llmkern.calibrate.data`); None takes the text that
            comes with llmkern. Not for "sequence" and "in_context", which have prompts and answers.
        tokenizer: the student's; needed where the data is text.
        teacher_tokenizer: the teacher's, by default the student's. If given, checked to be the same
            where logits are compared. With one tokenizer, tables of embeddings may be padded to another
            size: losses are then taken over the tokenizer's tokens alone.
        seq_len: tokens per window; of prompt and answer together, at most.
        samples: most windows to train on; None: 4096.
        text_field: field of the data's rows that holds their text; None chooses, and says which.
        progress: say on standard error how far it is.
        keep_zeros: the zeros of a student's pruned layers stay zero (see `llmkern.keep_masks`).
        options: those of the method (`SoftOptions`, `HiddenOptions`, `GkdOptions`, `MiniLlmOptions`,
            `SequenceOptions`, `InContextOptions`) and of `llmkern.train.TrainOptions`.

    Returns:
        The report.

    Raises:
        ValueError: an unknown method or option or one out of range, different tokenizers or
            vocabularies, a student with packed layers, bad data, a checkpoint of other settings; a model
            that reads or writes no text.
        FloatingPointError: the loss became NaN; the last checkpoint is left alone.
        NotImplementedError: checkpoints or sampling from the student under FSDP; an encoder-decoder
            model.

    Source: Hinton et al. 2015, arXiv 1503.02531; Kim & Rush 2016, arXiv 1606.07947 (sequence level);
    Gu et al. 2023, arXiv 2306.08543 (MiniLLM); Agarwal et al. 2023, arXiv 2306.13649 (GKD); Huang et al.
    2022, arXiv 2212.10670 (in context).
    """
    kind = find_method(METHODS, method)
    settings, training = sort_options(kind, options, TrainOptions)
    for name, model in (("student", student), ("teacher", teacher)):
        if model is not None:
            check_writes_text(model, name)
    training.check_places()
    if not is_dense(student):
        raise ValueError("student: got packed layers in it, expected dense weights to train")
    if kind.answers:
        given = {"data": data, "samples": samples, "text_field": text_field}
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"{name}: not an option of method {method!r}, expected None: it trains on answers"
                )
    texts = (data, seq_len, 4096 if samples is None else samples)
    job = DistillJob(student, teacher, tokenizer, teacher_tokenizer, *texts, training, progress)
    job.text_field = text_field
    modes = student.training, teacher is not None and teacher.training
    if teacher is not None:
        # Dropout in the teacher would make its targets noise.
        teacher.eval()
    used = _described(settings)
    reading: AbstractContextManager[object] = nullcontext()
    if teacher is not None and teacher is not student:
        (dtype,) = whole_dtypes([teacher])
        reading = computing_in(teacher, dtype)
        note = compute_note(teacher, dtype)
        job.notes += [] if note is None else [f"the teacher is {note}"]
    try:
        with reading, float32_parameters(student):
            plan = kind.plan(job, settings)
            kept: AbstractContextManager[object] = nullcontext()
            if keep_zeros and pruned_layers(student):
                kept = keep_masks(student)
            every = -(-training.checkpoint_every // plan.every) * plan.every
            training = dataclasses.replace(training, checkpoint_every=every)
            with kept:
                report = fit(
                    plan.module,
                    plan.data,
                    training,
                    progress=progress,
                    prepare=plan.prepare,
                    sums=plan.sums,
                    settings={"method": method}
                    | {k: v for k, v in used.items() if k not in _PLACES},
                )
    except FloatingPointError as error:
        hint = "" if teacher is None else overflow_hint(next(teacher.parameters()).dtype)
        raise FloatingPointError(f"{error}{hint and f'; the teacher{hint}'}") from error
    finally:
        student.train(modes[0])
        if teacher is not None:
            teacher.train(modes[1])
    rows = next(iter(plan.data.values()))
    return DistillReport(method, used, len(rows), rows.shape[1], report, [*job.notes, *plan.notes])


def _described(settings: Any) -> dict[str, Any]:
    """The options, ready for JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, tuple) and len(value) > 20:
            return f"{len(value)} texts"
        return list(value) if isinstance(value, tuple) else value

    return {name: plain(value) for name, value in vars(settings).items()}
