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
from llmkern.models.vocabulary import logits_width, shared_vocabulary
from llmkern.train import Prepare, Sums, TrainOptions


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
        vocabulary: first tokens, which alone are compared, once `check_tokens` has found that the models'
            tables differ in size; else None.
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
    vocabulary: int | None = None

    def windows(self) -> Tensor:
        """Windows of the data, int64 [n, seq_len]; errors are those of `load_windows`."""
        windows = load_windows(
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
        self.check_shared(windows, "data")
        return windows

    def check_tokens(self) -> None:
        """Refuse models whose logits do not mean the same tokens; find those that both know.

        Raises:
            ValueError: no teacher, different tokenizers or vocabularies.
        """
        if self.teacher is None:
            raise ValueError("teacher: got None, expected a model: its logits are compared")
        self.vocabulary = shared_vocabulary(
            (logits_width(self.student), logits_width(self.teacher)),
            (self.tokenizer, self.teacher_tokenizer),
            ("student", "teacher"),
        )

    def check_shared(self, tokens: Tensor, argument: str) -> None:
        """Refuse tokens that only one of the models knows.

        Raises:
            ValueError: a token outside of what `check_tokens` has found.
        """
        if self.vocabulary is not None and int(tokens.max()) >= self.vocabulary:
            raise ValueError(
                f"{argument}: got token {int(tokens.max())}, expected tokens below {self.vocabulary}, "
                "those of the tokenizer: what is beyond is padding of a model's table"
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
        sums: see `fit`.
    """

    module: nn.Module
    data: Mapping[str, Tensor]
    prepare: Prepare | None = None
    notes: list[str] = field(default_factory=list)
    every: int = 1
    sums: Sums | None = None


def main_process_first(model: nn.Module) -> AbstractContextManager[None]:
    """Under `accelerate launch`, the main process goes ahead, so that the others find its files."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return nullcontext()
    from accelerate import PartialState

    on_cpu = next(model.parameters()).device.type == "cpu"
    waiting: AbstractContextManager[None] = PartialState(cpu=on_cpu).main_process_first()
    return waiting
