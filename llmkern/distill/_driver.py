"""`distill`: checks, the module that is trained, and the training."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmkern._drive import sort_options
from llmkern.calibrate import load_windows
from llmkern.calibrate.data import Source
from llmkern.distill._heads import Outputs, has_plain_head, run
from llmkern.distill._student import is_dense
from llmkern.distill.hidden import HiddenLoss, HiddenOptions
from llmkern.distill.soft import SoftOptions, soft_loss
from llmkern.masks import keep_masks, pruned_layers
from llmkern.models import vocabulary_size
from llmkern.train import TrainOptions, TrainReport, fit

METHODS: dict[str, type[SoftOptions]] = {"soft": SoftOptions, "hidden": HiddenOptions}


@dataclass
class DistillReport:
    """What `distill` did.

    Attributes:
        method: one of `METHODS`.
        options: the method's options, as used.
        windows, window: training windows and their tokens.
        training: loss of each step, seconds.
    """

    method: str
    options: dict[str, Any]
    windows: int
    window: int
    training: TrainReport

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)


def distill(
    student: Any,
    teacher: Any,
    method: str = "soft",
    *,
    data: Source = None,
    tokenizer: Any = None,
    teacher_tokenizer: Any = None,
    seq_len: int | None = None,
    samples: int = 4096,
    progress: bool = False,
    keep_zeros: bool = True,
    **options: Any,
) -> DistillReport:
    """Train `student`, in place, to predict what `teacher` predicts.

    Args:
        student: a dense transformers causal language model (`make_student` makes one from the
            teacher). It is trained in float32 and gets its own dtype back.
        teacher: any transformers causal language model, packed or pruned ones too; only read.
        method: "soft" (cross-entropy and a divergence of the logits) or "hidden" (and hidden states,
            attention maps).
        data: text, path, tokens or dataset (see `llmkern.calibrate.data`); None takes the text that
            comes with llmkern.
        tokenizer: the student's; needed where the data is text.
        teacher_tokenizer: if given, checked to be the student's.
        seq_len: tokens per window.
        samples: most windows to train on.
        progress: show a progress bar.
        keep_zeros: the zeros of a student's pruned layers stay zero (see `llmkern.keep_masks`).
        options: those of the method (`SoftOptions`, `HiddenOptions`) and of `llmkern.train.TrainOptions`.

    Returns:
        The report.

    Raises:
        ValueError: an unknown method or option or one out of range, different tokenizers or
            vocabularies, a student with packed layers, bad data, a checkpoint of other settings.
        FloatingPointError: the loss became NaN; the last checkpoint is left alone.

    Source: Hinton et al. 2015, arXiv 1503.02531; Gu et al. 2023, arXiv 2306.08543 (reverse KL); Agarwal
    et al. 2023, arXiv 2306.13649 (JSD).
    """
    settings, training = sort_options(method, METHODS, options, TrainOptions)
    if not is_dense(student):
        raise ValueError("student: got packed layers in it, expected dense weights to train")
    _check_tokens(student, teacher, tokenizer, teacher_tokenizer, settings)
    windows = load_windows(
        data,
        student,
        tokenizer,
        seq_len=seq_len,
        samples=samples,
        seed=training.seed,
        argument="data",
    )
    dtype = next(student.parameters()).dtype
    student.float()
    modes = student.training, teacher.training
    # Dropout in the teacher would make its targets noise.
    teacher.eval()
    try:
        module = Distiller(student, teacher, settings, windows[:1, :8])
        kept: AbstractContextManager[object] = nullcontext()
        if keep_zeros and pruned_layers(student):
            kept = keep_masks(student)
        with kept:
            report = fit(module, {"input_ids": windows}, training, progress=progress)
    finally:
        student.to(dtype).train(modes[0])
        teacher.train(modes[1])
    used = dataclasses.asdict(settings)
    return DistillReport(method, used, len(windows), windows.shape[1], report)


class Distiller(nn.Module):
    """Student, projections and loss as one module, so that one forward is all that a step needs."""

    def __init__(self, student: Any, teacher: Any, options: SoftOptions, probe: Tensor) -> None:
        super().__init__()
        self.student = student
        self.extra: HiddenLoss | None = None
        if isinstance(options, HiddenOptions):
            self.extra = HiddenLoss(student, teacher, options)
        # In a list, so that the teacher is neither trained, saved nor wrapped with the rest.
        self._teacher = [teacher]
        self._options = options
        student.eval()
        self._plain = [has_plain_head(m, probe.to(m.device)) for m in (student, teacher)]

    def forward(self, batch: dict[str, Tensor], num_items: float) -> dict[str, Tensor]:
        """{"loss", "ce", "kd", ...}, sums over the batch's predictions divided by num_items."""
        options = self._options
        states, maps = False, False
        if isinstance(options, HiddenOptions):
            states, maps = True, options.attention_weight > 0
        mine = run(self.student, batch, self._plain[0], states, maps)
        theirs: Outputs | None = None
        if options.alpha > 0 or states:
            teacher = self._teacher[0]
            device = next(teacher.parameters()).device
            with torch.no_grad():
                on_device = {name: tensor.to(device) for name, tensor in batch.items()}
                theirs = run(teacher, on_device, self._plain[1], states, maps)
                theirs = _to(theirs, batch["input_ids"].device)
        labels = batch.get("labels", batch["input_ids"])
        target = theirs if options.alpha > 0 else None
        losses = soft_loss(mine, target, labels, options, num_items)
        if self.extra is not None and isinstance(options, HiddenOptions):
            assert theirs is not None
            counts = labels != -100
            share = (labels[:, 1:] != -100).sum() / num_items
            extra = self.extra(mine, theirs, counts)
            extra = {name: value * share for name, value in extra.items()}
            weights = {"hidden": options.hidden_weight, "attention": options.attention_weight}
            total = sum(weights[name] * value for name, value in extra.items())
            losses |= extra | {"loss": losses["loss"] + total}
        return losses


def _to(outputs: Outputs, device: torch.device) -> Outputs:
    """A teacher on another device: its outputs on the student's."""

    def move(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(v.to(device) for v in value)
        return None if value is None else value.to(device)

    return Outputs(*(move(value) for value in outputs))


def _check_tokens(
    student: Any, teacher: Any, tokenizer: Any, teacher_tokenizer: Any, options: SoftOptions
) -> None:
    """The logits of both models must mean the same tokens."""
    if tokenizer is not None and teacher_tokenizer is not None:
        mine, theirs = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
        if mine != theirs:
            odd = next(t for t in {**theirs, **mine} if mine.get(t) != theirs.get(t))
            raise ValueError(
                f"tokenizer: got another vocabulary than the teacher's ({odd!r} is {mine.get(odd)} in "
                f"one and {theirs.get(odd)} in the other), expected the same: logits are compared"
            )
    sizes = vocabulary_size(student), vocabulary_size(teacher)
    if sizes[0] != sizes[1] and (teacher_tokenizer is None or (sizes[0] or 0) > (sizes[1] or 0)):
        # With equal tokenizers the teacher may be padded to a rounder size.
        raise ValueError(
            f"student: got a vocabulary of {sizes[0]}, expected the teacher's, {sizes[1]}: logits are "
            "compared"
        )
