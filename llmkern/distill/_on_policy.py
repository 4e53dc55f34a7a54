"""Rows that the student itself writes while it is trained, from prompts.

What a row holds follows from its position in the run and the weights of its step, so that neither an
interruption nor the division of a step into forwards and processes changes it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmkern.distill._generate import (
    Mixture,
    Sampled,
    SamplingOptions,
    check_room,
    sample,
    seeded_uniforms,
    stop_tokens,
)
from llmkern.distill._plan import DistillJob
from llmkern.distill._rows import Tokens, pad_rows, pad_token, prompt_tokens
from llmkern.distill._texts import read_prompts
from llmkern.train import Order, Place

# Tokens of a window that are a prompt, where nothing else is asked for.
_PROMPT_LEN = 32


@dataclass(frozen=True)
class OnPolicyOptions(SamplingOptions):
    """Options of methods that learn from the student's own samples; those of the sampling, and

    Attributes:
        prompts: file of prompts (.jsonl with {"prompt": ...} a line, or a text with a prompt a line), or
            the prompts; None: the first tokens of the data's windows.
        prompt_len: without prompts, first tokens of a window that make one; None: 32.
        chat_template: put prompts into the tokenizer's chat template.
    """

    prompts: str | Path | tuple[str, ...] | None = None
    prompt_len: int | None = None
    chat_template: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_len is not None and self.prompt_len < 1:
            raise ValueError(f"prompt_len: got {self.prompt_len}, expected at least 1")
        if self.prompt_len is not None and self.prompts is not None:
            raise ValueError(
                f"prompt_len: got {self.prompt_len} with prompts, expected one of them"
            )
        if self.chat_template and self.prompts is None:
            raise ValueError("chat_template: got True without prompts, expected prompts for it")


class OnPolicy:
    """Draws the rows of a forward from the student, or from a mixture with the teacher."""

    def __init__(self, job: DistillJob, options: OnPolicyOptions, share: float = 0.0) -> None:
        """Read and check the prompts.

        Args:
            job: the models and the data.
            options: where prompts come from, how rows are drawn.
            share: probability of drawing a token from the teacher.

        Raises:
            ValueError: bad prompts, or prompts and answers that are longer than a context.
            NotImplementedError: a student that is sharded over processes (FSDP).
        """
        if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
            raise NotImplementedError(
                "method: got one that samples from the student under FSDP, expected one process or DDP"
            )
        self._student, self._options, self._seed = job.student, options, job.training.seed
        self._mixture = Mixture(job.teacher, share) if share else None
        self._prompts = None if options.prompts is None else _encoded(job, options)
        self._order = Order(len(self._prompts or ()), self._seed)
        self._ends = stop_tokens(job.student, job.tokenizer)
        self._length = options.prompt_len or _PROMPT_LEN
        readers = [job.student] if self._mixture is None else [job.student, job.teacher]
        lengths, source = [self._length], "prompt_len"
        if self._prompts is not None:
            lengths, source = [len(prompt) for prompt in self._prompts], "prompts"
        check_room(lengths, options.max_new_tokens, readers, source)
        self._vocabulary = job.vocabulary

    def data(self, job: DistillJob, needed: bool) -> Tensor:
        """What `fit` takes its rows from, int64 [n, T].

        Args:
            job: the models and the data.
            needed: windows of the data are trained on as they are, too.

        Raises:
            ValueError: data that nothing would be read of; windows shorter than a prompt.
        """
        if self._prompts is None or needed:
            windows = job.windows()
            if self._prompts is None and windows.shape[1] < self._length:
                raise ValueError(
                    f"prompt_len: got {self._length}, expected at most the window of {windows.shape[1]}"
                )
            return windows
        for name in ("data", "seq_len", "text_field"):
            if getattr(job, name) is not None:
                raise ValueError(
                    f"{name}: got it with prompts, and no weight of the data; expected None"
                )
        pad = 0 if job.tokenizer is None else pad_token(job.tokenizer)
        return pad_rows([(prompt, []) for prompt in self._prompts], pad)["input_ids"]

    def __call__(self, windows: Tensor, place: Place) -> Sampled:
        """The rows of one forward.

        Args:
            windows: int64 [B, T], rows of the data, of which the first tokens are prompts if there are
                no others.
            place: of the forward in the run.
        """
        positions = range(place.first, place.first + len(windows))
        prompts: Sequence[Tokens]
        if self._prompts is None:
            prompts = windows[:, : self._length].tolist()
        else:
            prompts = [self._prompts[self._order.row(position)] for position in positions]
        count = self._options.max_new_tokens
        uniforms = torch.stack(
            [seeded_uniforms(count, "on-policy", self._seed, position) for position in positions]
        )
        return sample(
            self._student,
            prompts,
            uniforms,
            self._options,
            self._ends,
            self._mixture,
            self._vocabulary,
        )


def _encoded(job: DistillJob, options: OnPolicyOptions) -> list[Tokens]:
    assert options.prompts is not None
    if job.tokenizer is None:
        raise ValueError("tokenizer: got None, expected a tokenizer, because prompts are text")
    if options.chat_template and not getattr(job.tokenizer, "chat_template", None):
        raise ValueError("chat_template: got True, expected a tokenizer that has a chat template")
    texts = read_prompts(options.prompts)
    prompts = [prompt_tokens(job.tokenizer, text, options.chat_template) for text in texts]
    job.check_shared(
        torch.tensor([0, *(token for prompt in prompts for token in prompt)]), "prompts"
    )
    return prompts
