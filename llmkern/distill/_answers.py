"""A teacher's answers, kept in a file line by line so that a run that was killed goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from llmkern._json import to_json
from llmkern._progress import Bar
from llmkern.distill._generate import (
    SamplingOptions,
    check_room,
    sample,
    seeded_uniforms,
    stop_tokens,
)
from llmkern.distill._rows import Tokens, prompt_tokens
from llmkern.distill._texts import Pair, json_lines
from llmkern.models.vocabulary import known_tokens

_KIND = "llmkern answers"


@dataclass
class Questions:
    """What a teacher is asked.

    Attributes:
        prompts: texts that the student gets.
        contexts: texts that the teacher gets, one for each prompt.
        per_prompt: answers to each.
        sampling: how they are drawn.
        stop: text before which an answer ends; None for none.
        chat: put them into the tokenizer's chat template.
        seed: of the sampling.
        batch_size: prompts per forward.
    """

    prompts: Sequence[str]
    contexts: Sequence[str]
    per_prompt: int
    sampling: SamplingOptions
    stop: str | None
    chat: bool
    seed: int
    batch_size: int


def collect_answers(
    teacher: Any, tokenizer: Any, questions: Questions, path: Path | None, progress: bool
) -> list[Pair]:
    """The answers to all questions, in order: those in the file, and the missing ones from the teacher.

    Args:
        teacher: a transformers causal language model.
        tokenizer: the teacher's.
        questions: see there.
        path: file that keeps the answers; None keeps none.
        progress: show a bar.

    Raises:
        ValueError: a prompt that leaves no room for an answer; a file of other settings, another
            teacher, or one that llmkern did not write (the difference is named).
    """
    rows = [prompt_tokens(tokenizer, text, questions.chat) for text in questions.contexts]
    check_room([len(row) for row in rows], questions.sampling.max_new_tokens, [teacher], "prompts")
    header = _header(teacher, questions)
    found: dict[tuple[int, int], Pair] = {}
    if path is not None and path.exists():
        found = _stored(path, header)
    # Prompts of similar length share a batch.
    jobs = [
        (i, k)
        for i in sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for k in range(questions.per_prompt)
    ]
    ends, known = stop_tokens(teacher, tokenizer), known_tokens(tokenizer)
    size = questions.batch_size
    batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    with _Writer(path, header, len(found), len(jobs), progress) as writer:
        for batch in batches:
            if all(job in found for job in batch):
                continue
            # A batch of which some answers are there is done again whole: to the same numbers.
            answers = _answer_batch(teacher, tokenizer, questions, batch, rows, ends, known)
            for job, answer in zip(batch, answers, strict=True):
                if job not in found:
                    found[job] = answer
                    writer.write(job, answer)
            writer.flush()
    return [found[i, k] for i in range(len(rows)) for k in range(questions.per_prompt)]


def _answer_batch(
    teacher: Any,
    tokenizer: Any,
    questions: Questions,
    batch: Sequence[tuple[int, int]],
    rows: Sequence[Tokens],
    ends: Sequence[int],
    known: int,
) -> list[Pair]:
    count = questions.sampling.max_new_tokens
    uniforms = torch.stack(
        [seeded_uniforms(count, "answers", questions.seed, i, k) for i, k in batch]
    )
    # Padding of the teacher's table is no text.
    prompts = [rows[i] for i, _ in batch]
    sampled = sample(teacher, prompts, uniforms, questions.sampling, ends, None, known)
    pairs = []
    for (i, _), ids, labels in zip(batch, sampled.input_ids, sampled.labels, strict=True):
        drawn = ids[labels != -100].tolist()
        finished = bool(drawn) and drawn[-1] in ends
        # Some tokenizers drop the space before a text that stands alone.
        before = tokenizer.decode(rows[i], skip_special_tokens=True)
        whole = tokenizer.decode([*rows[i], *drawn], skip_special_tokens=True)
        text = whole.removeprefix(before)
        if not whole.startswith(before):
            text = tokenizer.decode(drawn, skip_special_tokens=True)
        if questions.stop is not None and questions.stop in text:
            text, finished = text[: text.index(questions.stop)], True
        pairs.append(Pair(questions.prompts[i], text, finished))
    return pairs


def read_answers(path: Path) -> dict[tuple[int, int], Pair] | None:
    """All answers of a file that `collect_answers` has written; None for any other file.

    Raises:
        ValueError: answers are missing in it.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        if _KIND not in file.readline():
            return None
    lines = list(json_lines(path, "answers"))
    found = _entries(lines[1:])
    wanted = lines[0][1]["answers"]
    if len(found) < wanted:
        raise ValueError(
            f"answers: got {len(found)} of {wanted} answers in {path}, expected all of them: give the "
            "teacher and prompts to go on"
        )
    return found


def _stored(path: Path, header: dict[str, Any]) -> dict[tuple[int, int], Pair]:
    """What a file holds that was begun with the same header; a line that was cut off is removed."""
    whole = path.read_bytes()
    kept = whole[: whole.rfind(b"\n") + 1]
    if kept != whole:
        with path.open("r+b") as file:
            file.truncate(len(kept))
    if not kept:
        return {}
    lines = list(json_lines(path, "answers"))
    first = lines[0][1] if lines else {}
    if first.get("kind") != _KIND:
        raise ValueError(
            f"answers: got {path}, which llmkern did not write, with prompts; expected another file, "
            "or no prompts, to train on the answers as they are"
        )
    for name, value in header.items():
        if first.get(name) != value:
            raise ValueError(
                f"answers: {path} was made with {name} = {first.get(name)!r}, this run has {value!r}; "
                "expected the same, or another file"
            )
    return _entries(lines[1:])


def _entries(lines: Sequence[tuple[str, dict[str, Any]]]) -> dict[tuple[int, int], Pair]:
    found = {}
    for where, entry in lines:
        try:
            job = int(entry["number"]), int(entry["sample"])
            found[job] = Pair(str(entry["prompt"]), str(entry["answer"]), bool(entry["finished"]))
        except KeyError as error:
            raise ValueError(f"{where}: got no {error}, expected a line of an answer") from error
    return found


def _header(teacher: Any, questions: Questions) -> dict[str, Any]:
    """All that the answers depend on, in a form that can be compared."""
    sampling = questions.sampling
    return {
        "kind": _KIND,
        "answers": len(questions.prompts) * questions.per_prompt,
        "teacher": fingerprint(teacher),
        "prompts": _digest([list(questions.prompts), list(questions.contexts)]),
        "answers_per_prompt": questions.per_prompt,
        "max_new_tokens": sampling.max_new_tokens,
        "sample_temperature": sampling.sample_temperature,
        "top_p": sampling.top_p,
        "stop": questions.stop,
        "chat_template": questions.chat,
        "seed": questions.seed,
    }


def fingerprint(model: Any) -> str:
    """Class, shapes, and a few values of every tensor of a model, as one short text.

    Values are sampled, so that a large model costs no more time than a small one.
    """
    parts: list[Any] = [type(model).__name__]
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        picked = flat[:: max(1, len(flat) // 64)][:64].double().cpu()
        parts.append([name, list(tensor.shape), str(tensor.dtype), picked.tolist()])
    return f"{type(model).__name__} {_digest(parts)}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


class _Writer:
    """The file, opened where there is something to write, and a progress bar."""

    def __init__(
        self, path: Path | None, header: dict[str, Any], found: int, total: int, progress: bool
    ) -> None:
        self._path, self._header = path, header
        self._file: TextIO | None = None
        shown = progress and found < total
        self._bar = Bar("answers", total, "answer", shown=shown, initial=found)

    def __enter__(self) -> _Writer:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            new = not self._path.exists() or not self._path.stat().st_size
            self._file = self._path.open("a", encoding="utf-8")
            if new:
                self._line(self._header)
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()

    def write(self, job: tuple[int, int], answer: Pair) -> None:
        entry = {"number": job[0], "sample": job[1], **answer._asdict()}
        self._line(entry)
        self._bar.update()

    def flush(self) -> None:
        """What is written survives the process and the machine."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def _line(self, entry: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(to_json(entry, ensure_ascii=False) + "\n")
