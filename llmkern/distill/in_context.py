"""What a teacher can do with examples or room to reason, the student learns to do without.

The teacher reads demonstrations (Brown et al. 2020, arXiv 2005.14165), or a template that asks for a
chain of thought (Wei et al. 2022, arXiv 2201.11903), before each prompt. The student learns its answers
to the bare prompts, as text, with or without the reasoning (Snell et al. 2022, arXiv 2209.15189), and on
request the distributions of the teacher in its context at each token of an answer (Huang et al. 2022,
arXiv 2212.10670).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmkern.distill._distiller import Distiller
from llmkern.distill._generate import seeded_uniforms
from llmkern.distill._method import HALF, DistillMethod
from llmkern.distill._plan import DistillJob, Plan
from llmkern.distill._rows import Tokens, pad_rows, pad_token, pair_tokens, prompt_tokens, trim
from llmkern.distill._soft_loss import SoftOptions
from llmkern.distill._texts import Pair, read_pairs
from llmkern.distill.sequence import (
    Lesson,
    SequenceOptions,
    check_vocabulary,
    extract,
    fit_rows,
    gather,
    row_limit,
)
from llmkern.models import context_length


@dataclass(frozen=True)
class InContextOptions(SequenceOptions):
    """Options of in-context distillation; those of training on answers, and

    Attributes:
        demonstrations: file of prompts and answers (its lines as in `read_pairs`) that the teacher gets
            as examples.
        shots: examples before each prompt, chosen by the seed, never the prompt itself.
        demonstration: how an example is written, with {prompt} and {answer}. What follows {answer} in it
            ends an answer, unless stop says otherwise.
        template: how the prompt is written for the teacher, with {prompt}, as in "{prompt} Let us think
            step by step."; None: as it is.
        alpha: weight of the divergence from the teacher's distributions, in [0, 1]; 0: its text alone.
        temperature, divergence, beta: of that divergence, see `SoftOptions`.
    """

    demonstrations: str | Path | None = None
    shots: int = 4
    demonstration: str = "{prompt}{answer}\n\n"
    template: str | None = None
    alpha: float = 0.0
    temperature: float = 1.0
    divergence: str = "forward_kl"
    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.soft()
        if self.demonstrations is None and self.template is None:
            raise ValueError("demonstrations, template: got neither, expected one of them or both")
        if self.shots < 1:
            raise ValueError(f"shots: got {self.shots}, expected at least 1")
        for name, marks in (
            ("template", ("{prompt}",)),
            ("demonstration", ("{prompt}", "{answer}")),
        ):
            text = getattr(self, name)
            for mark in marks:
                if text is not None and text.count(mark) != 1:
                    raise ValueError(f"{name}: got {text!r}, expected a text with one {mark}")
        if self.prompts is None and self.alpha == 0:
            raise ValueError(
                "prompts: got None with alpha = 0, expected prompts: the teacher would read nothing"
            )

    def soft(self) -> SoftOptions:
        """The loss of the answers' tokens."""
        return SoftOptions(self.alpha, self.temperature, self.divergence, self.beta)


def plan_in_context(job: DistillJob, options: InContextOptions) -> Plan:
    """Rows of the student without the context and, for the logits, of the teacher with it.

    Raises:
        ValueError: bad demonstrations, different tokenizers if logits are compared, and what
            `plan_sequence` raises.
    """
    if options.alpha > 0:
        job.check_tokens()
    context = _Context(options, job.training.seed)
    stop = options.stop or context.separator
    pairs = gather(job, options, lambda prompts: [context.around(p) for p in prompts], stop)
    notes: list[str] = []
    lessons = extract(pairs, options, notes)
    pad, chat = pad_token(job.tokenizer), options.chat_template
    rows = [pair_tokens(job.tokenizer, pair, chat) for _, pair in lessons]
    theirs: list[Tokens] = []
    if options.alpha > 0:
        theirs = [_read_by_teacher(job, lesson, context, chat) for lesson in lessons]
        both = [(before, answer) for before, (_, answer) in zip(theirs, rows, strict=True)]
        both = fit_rows(both, context_length(job.teacher), "prompts in their context", notes)
        rows = [(row[0], answer) for row, (_, answer) in zip(rows, both, strict=True)]
    rows = fit_rows(rows, row_limit(job), "prompts", notes)
    data = pad_rows(rows, pad)
    if options.alpha > 0:
        same = [(before, answer) for before, (_, answer) in zip(theirs, rows, strict=True)]
        names = {
            "input_ids": "teacher_ids",
            "attention_mask": "teacher_mask",
            "labels": "teacher_labels",
        }
        data |= {names[name]: tensor for name, tensor in pad_rows(same, pad).items()}
    check_vocabulary(job, data)
    teacher = job.teacher if options.alpha > 0 else None
    module = Distiller(job.student, teacher, options.soft(), job.vocabulary)
    return Plan(module, data, trim, notes)


def _read_by_teacher(job: DistillJob, lesson: Lesson, context: _Context, chat: bool) -> Tokens:
    """What the teacher reads before it predicts what the student learns."""
    prompt = lesson.pair.prompt
    if not isinstance(prompt, str):
        raise ValueError(
            f"answers: got a conversation of {len(prompt)} turns before an answer, expected one prompt, "
            "which the context is put around"
        )
    return prompt_tokens(job.tokenizer, context.around(prompt), chat, lesson.reasons)


class _Context:
    """Examples and template around a prompt; the examples follow from the prompt and the seed."""

    def __init__(self, options: InContextOptions, seed: int) -> None:
        self._options, self._seed = options, seed
        self._demonstrations: list[Pair] = []
        self.separator: str | None = None
        if options.demonstrations is not None:
            self._demonstrations = read_pairs(options.demonstrations, "demonstrations")
            self.separator = options.demonstration.partition("{answer}")[2] or None
            for pair in self._demonstrations:
                if not isinstance(pair.prompt, str):
                    raise ValueError(
                        f"demonstrations: got a conversation of {len(pair.prompt)} turns before an "
                        "answer, expected one prompt"
                    )

    def around(self, prompt: str) -> str:
        """What the teacher reads for a prompt."""
        options = self._options
        asked = (options.template or "{prompt}").replace("{prompt}", prompt)
        return "".join(self._written(pair) for pair in self._chosen(prompt)) + asked

    def _chosen(self, prompt: str) -> Sequence[Pair]:
        if not self._demonstrations:
            return ()
        others = [pair for pair in self._demonstrations if pair.prompt != prompt]
        shots = self._options.shots
        if len(others) < shots:
            raise ValueError(
                f"shots: got {shots}, expected at most {len(others)}, the demonstrations that are not "
                "the prompt itself"
            )
        order = seeded_uniforms(len(others), "shots", self._seed, prompt).argsort(stable=True)
        return [others[i] for i in order[:shots].tolist()]

    def _written(self, pair: Pair) -> str:
        before, _, after = self._options.demonstration.partition("{answer}")
        assert isinstance(pair.prompt, str)
        # Each half by itself: a prompt may hold the marks, too.
        question = before.replace("{prompt}", pair.prompt)
        return question + pair.answer + after.replace("{prompt}", pair.prompt)


METHOD = DistillMethod(
    name="in_context",
    about="the teacher's answers in a context that the student does not get",
    options=InContextOptions,
    plan=plan_in_context,
    answers=True,
    reads_windows=lambda options: False,
    compared={
        "distill in context": {
            "prompts": None,
            "template": "The following text is clear, complete and correct.\n\n{prompt}",
            "alpha": 0.5,
            **HALF,
        }
    },
)
