"""Sequence level: the student learns the teacher's answers as text (Kim & Rush 2016, arXiv 1606.07947).

Nothing of the teacher is needed but its answers, so that it may have another tokenizer or only an API.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from llmkern.distill._answers import Questions, collect_answers, read_answers
from llmkern.distill._distiller import Distiller
from llmkern.distill._generate import SamplingOptions
from llmkern.distill._method import HALF, DistillMethod
from llmkern.distill._plan import DistillJob, Plan, main_process_first
from llmkern.distill._rows import (
    Tokens,
    has_template,
    pad_rows,
    pad_token,
    pair_tokens,
    prompt_tokens,
    trim,
)
from llmkern.distill._soft_loss import SoftOptions
from llmkern.distill._texts import Pair, read_pairs, read_prompts
from llmkern.models import context_length, vocabulary_size

# Options that say how answers are drawn.
_DRAWING = (
    "max_new_tokens",
    "sample_temperature",
    "top_p",
    "answers_per_prompt",
    "answer_batch",
    "stop",
)


@dataclass(frozen=True)
class SequenceOptions(SamplingOptions):
    """Options of training on answers; those of the sampling of the teacher's, and

    Attributes:
        prompts: file of prompts that the teacher answers (.jsonl with {"prompt": ...} a line, or a text
            with a prompt a line), or the prompts; None: the answers are there already.
        answers: file that keeps the teacher's answers, from which an interrupted run goes on; without
            prompts, the file of prompts and answers to train on (see `read_pairs` for its lines). Of
            several processes the main one asks the teacher while the others wait, no longer than the
            timeout of their group: for many prompts let one process alone write the file first.
        answers_per_prompt: answers that the teacher gives.
        answer_batch: prompts per forward of the teacher.
        stop: text before which an answer ends.
        answer_pattern: regular expression whose first group (or whole match), at its last match in an
            answer, is all that the student learns of it, as "####(.*)" without the reasoning before;
            answers without a match are left out.
        chat_template: put prompts into the chat template of the tokenizers that have one.
    """

    prompts: str | Path | tuple[str, ...] | None = None
    answers: str | Path | None = None
    answers_per_prompt: int = 1
    answer_batch: int = 16
    stop: str | None = None
    answer_pattern: str | None = None
    chat_template: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("answers_per_prompt", "answer_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.prompts is None and self.answers is None:
            raise ValueError("prompts, answers: got neither, expected one of them or both")
        if self.prompts is None:
            for name in _DRAWING:
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ValueError(
                        f"{name}: got {getattr(self, name)!r} without prompts, expected prompts that a "
                        "teacher answers"
                    )
        if self.stop == "":
            raise ValueError("stop: got an empty text, expected some")
        if self.answer_pattern is not None:
            try:
                re.compile(self.answer_pattern)
            except re.error as error:
                raise ValueError(
                    f"answer_pattern: got {self.answer_pattern!r}, expected a regular expression "
                    f"({error})"
                ) from error


def plan_sequence(job: DistillJob, options: SequenceOptions) -> Plan:
    """Answers as rows, and the cross-entropy on them.

    Raises:
        ValueError: prompts without a teacher or a tokenizer, bad files, no answer left to train on.
    """
    pairs = gather(job, options, lambda prompts: prompts, options.stop)
    notes: list[str] = []
    lessons = extract(pairs, options, notes)
    rows = [pair_tokens(job.tokenizer, pair, options.chat_template) for _, pair in lessons]
    data = pad_rows(fit_rows(rows, row_limit(job), "prompts", notes), pad_token(job.tokenizer))
    check_vocabulary(job, data)
    module = Distiller(job.student, None, SoftOptions(alpha=0.0))
    return Plan(module, data, trim, notes)


def gather(
    job: DistillJob,
    options: SequenceOptions,
    extend: Callable[[list[str]], list[str]],
    stop: str | None,
) -> list[Pair]:
    """Prompts and answers, from the file or the teacher.

    Args:
        job: the models and their tokenizers.
        options: see there.
        extend: from the list of prompts to the list of what the teacher is asked.
        stop: text before which an answer ends.

    Raises:
        ValueError: see `plan_sequence`.
    """
    if job.tokenizer is None:
        raise ValueError("tokenizer: got None, expected the student's, because answers are text")
    asked = job.teacher_tokenizer or job.tokenizer
    speakers = [job.tokenizer] if options.prompts is None else [job.tokenizer, asked]
    if options.chat_template and not any(map(has_template, speakers)):
        raise ValueError("chat_template: got True, expected a tokenizer that has a chat template")
    limit = row_limit(job)
    if options.prompts is None:
        assert options.answers is not None
        path = Path(options.answers)
        own = read_answers(path) if path.is_file() else None
        if own is None:
            return read_pairs(path)
        return [own[key] for key in sorted(own)]
    prompts = read_prompts(options.prompts)
    if job.teacher is None:
        raise ValueError("teacher: got None with prompts, expected a model that answers them")
    # Now, not after the teacher has answered.
    bare: list[tuple[Tokens, Tokens]] = [
        (prompt_tokens(job.tokenizer, text, options.chat_template), []) for text in prompts
    ]
    fit_rows(bare, limit, "prompts", [])
    questions = Questions(
        prompts,
        extend(prompts),
        options.answers_per_prompt,
        SamplingOptions(options.max_new_tokens, options.sample_temperature, options.top_p),
        stop,
        options.chat_template,
        job.training.seed,
        options.answer_batch,
    )
    file = None if options.answers is None else Path(options.answers)
    if file is not None and file.is_dir():
        raise ValueError(f"answers: got {file}, a directory, expected a file to write")
    with main_process_first(job.student):
        return collect_answers(job.teacher, asked, questions, file, job.progress)


class Lesson(NamedTuple):
    """What is learned of an answer.

    Attributes:
        reasons: what stands before it in the teacher's answer and is not learned.
        pair: the prompt and what is learned.
    """

    reasons: str
    pair: Pair


def extract(pairs: Sequence[Pair], options: SequenceOptions, notes: list[str]) -> list[Lesson]:
    """What can be learned of each pair; notes say what is left out.

    Raises:
        ValueError: nothing is left.
    """
    lessons, empty, unmatched = [], 0, 0
    for pair in pairs:
        if not pair.answer.strip():
            empty += 1
            continue
        if options.answer_pattern is None:
            lessons.append(Lesson("", pair))
            continue
        matches = list(re.finditer(options.answer_pattern, pair.answer))
        group = 1 if matches and matches[-1].re.groups else 0
        if not matches or not (matches[-1].group(group) or "").strip():
            unmatched += 1
            continue
        learned = Pair(pair.prompt, matches[-1].group(group), True)
        lessons.append(Lesson(pair.answer[: matches[-1].start(group)], learned))
    if empty:
        notes.append(f"{empty} of {len(pairs)} answers are empty and were left out")
    if unmatched:
        notes.append(f"{unmatched} of {len(pairs)} answers do not match answer_pattern")
    if not lessons:
        raise ValueError(
            f"answers: got {len(pairs)}, of which {empty} are empty and {unmatched} do not match "
            "answer_pattern, expected some to train on"
        )
    return lessons


def row_limit(job: DistillJob) -> int | None:
    """Most tokens of a row: seq_len or the student's context.

    Raises:
        ValueError: seq_len beyond the context.
    """
    context = context_length(job.student)
    if job.seq_len is not None and (job.seq_len < 2 or (context and job.seq_len > context)):
        raise ValueError(
            f"seq_len: got {job.seq_len}, expected 2 to the model's context of {context}"
        )
    return job.seq_len or context


def fit_rows(
    rows: Sequence[tuple[Tokens, Tokens]], limit: int | None, what: str, notes: list[str]
) -> list[tuple[Tokens, Tokens]]:
    """Prompts and answers in at most `limit` tokens: answers are cut, and a note says how many.

    Raises:
        ValueError: a prompt that leaves no room for an answer (`what` says where it is from).
    """
    if limit is None:
        return list(rows)
    cut, fitting = 0, []
    for i, (prompt, answer) in enumerate(rows):
        if not prompt or len(prompt) >= limit:
            raise ValueError(
                f"{what}: got {len(prompt)} tokens in prompt number {i}, expected 1 to {limit - 1}, "
                f"which leaves room for an answer in {limit} tokens (seq_len or the context)"
            )
        cut += len(prompt) + len(answer) > limit
        fitting.append((prompt, answer[: limit - len(prompt)]))
    if cut:
        notes.append(f"{cut} of {len(rows)} answers were cut to rows of {limit} tokens")
    return fitting


def check_vocabulary(job: DistillJob, data: dict[str, Tensor]) -> None:
    """Refuse a tokenizer with more tokens than the student.

    Raises:
        ValueError: a token outside the student's vocabulary.
    """
    size, largest = vocabulary_size(job.student), int(data["input_ids"].max())
    if size is not None and largest >= size:
        raise ValueError(
            f"tokenizer: got token {largest}, expected tokens below the student's vocabulary of {size}"
        )
    for name in ("input_ids", "teacher_ids"):
        if name in data:
            job.check_shared(data[name], "tokenizer")


METHOD = DistillMethod(
    name="sequence",
    about="the teacher's answers to prompts, or those in a file, as text",
    options=SequenceOptions,
    plan=plan_sequence,
    answers=True,
    reads_windows=lambda options: False,
    needs_teacher=lambda options: options.prompts is not None,
    compared={"distill sequence": {"prompts": None, **HALF}},
)
