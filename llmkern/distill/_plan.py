"""What a method gets and what it makes of it: a module that returns its loss, and rows to feed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from llmkern.calibrate import load_windows
from llmkern.calibrate.data import Source, teller
from llmkern.models import vocabulary_size
from llmkern.train import Prepare, TrainOptions


@dataclass
class DistillJob:
    """What `distill` was called with.

    Attributes:
        student, teacher: models; the teacher may be None.
        tokenizer, teacher_tokenizer: theirs, as far as they were given.
        data, seq_len, samples: see `distill`.
        training: options of the loop.
        progress: show bars.
        text_field: see `distill`.
        notes: what was found in the data.
    """

    student: Any
    teacher: Any
    tokenizer: Any
    teacher_tokenizer: Any
    data: Source
    seq_len: int | None
    samples: int
    training: TrainOptions
    progress: bool
    text_field: str | None = None
    notes: list[str] = field(default_factory=list)

    def windows(self) -> Tensor:
        """Windows of the data, int64 [n, seq_len]; errors are those of `load_windows`."""
        return load_windows(
            self.data,
            self.student,
            self.tokenizer,
            seq_len=self.seq_len,
            samples=self.samples,
            seed=self.training.seed,
            text_field=self.text_field,
            argument="data",
            said=teller(self.notes, shown=self.progress),
        )

    def check_tokens(self) -> None:
        """Refuse models whose logits do not mean the same tokens.

        Raises:
            ValueError: no teacher, different tokenizers or vocabularies.
        """
        if self.teacher is None:
            raise ValueError("teacher: got None, expected a model: its logits are compared")
        if self.tokenizer is not None and self.teacher_tokenizer is not None:
            mine, theirs = self.tokenizer.get_vocab(), self.teacher_tokenizer.get_vocab()
            if mine != theirs:
                odd = next(t for t in {**theirs, **mine} if mine.get(t) != theirs.get(t))
                raise ValueError(
                    f"tokenizer: got another vocabulary than the teacher's ({odd!r} is "
                    f"{mine.get(odd)} in one and {theirs.get(odd)} in the other), expected the same: "
                    "logits are compared"
                )
        sizes = vocabulary_size(self.student), vocabulary_size(self.teacher)
        padded = self.teacher_tokenizer is not None and (sizes[0] or 0) <= (sizes[1] or 0)
        if sizes[0] != sizes[1] and not padded:
            # With equal tokenizers the teacher may be padded to a rounder size.
            raise ValueError(
                f"student: got a vocabulary of {sizes[0]}, expected the teacher's, {sizes[1]}: logits "
                "are compared"
            )


@dataclass
class Plan:
    """What is trained on what.

    Attributes:
        module: as `llmkern.train.fit` takes it.
        data: tensors with a row per window.
        prepare: see `fit`.
        notes: what the user should know.
        every: checkpoints are possible after a multiple of so many steps.
    """

    module: nn.Module
    data: Mapping[str, Tensor]
    prepare: Prepare | None = None
    notes: list[str] = field(default_factory=list)
    every: int = 1


def main_process_first(model: nn.Module) -> AbstractContextManager[None]:
    """Under `accelerate launch`, the main process goes ahead, so that the others find its files."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return nullcontext()
    from accelerate import PartialState

    on_cpu = next(model.parameters()).device.type == "cpu"
    waiting: AbstractContextManager[None] = PartialState(cpu=on_cpu).main_process_first()
    return waiting
