"""Prompts and answers as rows of tokens, of which only the answers are predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmkern.distill._texts import Pair, Prompt

Tokens = list[int]


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer knows how conversations are written."""
    return bool(getattr(tokenizer, "chat_template", None))


def prompt_tokens(tokenizer: Any, prompt: Prompt, chat: bool, then: str = "") -> Tokens:
    """A prompt as a model reads it before it answers.

    Args:
        tokenizer: of the model.
        prompt: a text, or the turns of a conversation.
        chat: use the tokenizer's chat template if it has one.
        then: what the answer has begun with.

    Raises:
        ValueError: a conversation without a chat template.
    """
    text = _prompt_text(tokenizer, prompt, chat) + then
    return _encode(tokenizer, text, not _templated(tokenizer, chat))


def pair_tokens(tokenizer: Any, pair: Pair, chat: bool) -> tuple[Tokens, Tokens]:
    """Prompt and answer, the answer as it is tokenized after the prompt, with the token that ends it.

    Arguments and errors are those of `prompt_tokens`.
    """
    special = not _templated(tokenizer, chat)
    text = _prompt_text(tokenizer, pair.prompt, chat)
    before = _encode(tokenizer, text, special)
    answer, closed = pair.answer, False
    if not special and pair.finished:
        turns = [*_turns(pair.prompt), {"role": "assistant", "content": pair.answer}]
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        if whole.startswith(text):
            answer, closed = whole[len(text) :], True
    both = _encode(tokenizer, text + answer, special)
    # Where a token reaches across the border, the two are tokenized apart.
    joined = both[: len(before)] == before
    after = both[len(before) :] if joined else _encode(tokenizer, answer, False)
    end = tokenizer.eos_token_id
    if pair.finished and not closed and end is not None:
        after = [*after, end]
    return before, after


def pad_rows(rows: Sequence[tuple[Tokens, Tokens]], pad: int) -> dict[str, Tensor]:
    """{"input_ids", "attention_mask", "labels"}, int64 [n, T], padded on the right.

    Args:
        rows: prompt and answer of each.
        pad: token of the padding.
    """
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), length), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (prompt, answer) in enumerate(rows):
        row = torch.tensor([*prompt, *answer])
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
        labels[i, len(prompt) : len(row)] = row[len(prompt) :]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trim(batch: dict[str, Tensor], place: object = None) -> dict[str, Tensor]:
    """The same rows without the columns that are padding in all of them."""
    trimmed = dict(batch)
    for ids, mask, labels in (
        ("input_ids", "attention_mask", "labels"),
        ("teacher_ids", "teacher_mask", "teacher_labels"),
    ):
        if mask in batch:
            length = int(batch[mask].sum(1).max())
            trimmed |= {name: batch[name][:, :length] for name in (ids, mask, labels)}
    return trimmed


def pad_token(tokenizer: Any) -> int:
    """A token for padding, whichever: nothing attends to it."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _templated(tokenizer: Any, chat: bool) -> bool:
    return chat and has_template(tokenizer)


def _turns(prompt: Prompt) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _prompt_text(tokenizer: Any, prompt: Prompt, chat: bool) -> str:
    if _templated(tokenizer, chat):
        text: str = tokenizer.apply_chat_template(
            _turns(prompt), tokenize=False, add_generation_prompt=True
        )
        return text
    if not isinstance(prompt, str):
        raise ValueError(
            f"answers: got a conversation of {len(prompt)} turns before an answer, expected "
            "chat_template=True and a tokenizer that has one"
        )
    return prompt


def _encode(tokenizer: Any, text: str, special: bool) -> Tokens:
    ids: Tokens = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    # Some tokenizers end every text; this one goes on.
    return ids[:-1] if special and ids and ids[-1] == end else ids
