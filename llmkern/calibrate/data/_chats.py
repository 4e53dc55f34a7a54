"""Conversations in rows, whatever their fields are called, and how a tokenizer writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkern.calibrate.data._files import is_turns

Turn = dict[str, Any]

CONVERSATIONS = ("messages", "conversations", "conversation")
# Question and answer, and what may stand between them.
PAIRS = (
    ("prompt", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
)
CONTEXTS = ("input", "context")
_SYSTEM = ("system", "system_prompt")
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bot", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
    **dict.fromkeys(("function_call",), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}


def chat_fields(row: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The fields of a row that hold its conversation; None where there is none."""
    for name in CONVERSATIONS:
        if is_turns(row.get(name)):
            return (name,)
    for question, answer in PAIRS:
        both = row.get(question), row.get(answer)
        if all(isinstance(value, str) or is_turns(value) for value in both):
            return question, answer
    return None


def turns_of(row: Mapping[str, Any], fields: tuple[str, ...]) -> list[Turn]:
    """The turns of a row, as {"role", "content"}; none where a field is empty.

    Args:
        row: of the source.
        fields: as `chat_fields` gives them.

    Raises:
        ValueError: a turn that is none, a role that is not known.
    """
    system = next((row[name] for name in _SYSTEM if isinstance(row.get(name), str)), "")
    before: list[Turn] = [{"role": "system", "content": system}] if system.strip() else []
    if len(fields) == 1:
        turns = as_turns(row.get(fields[0]), fields[0])
        return turns if not turns or turns[0]["role"] == "system" else before + turns
    question, answer = (row.get(name) for name in fields)
    if not _filled(question) or not _filled(answer):
        return []
    if isinstance(question, str):
        between = [row.get(name) for name in CONTEXTS if fields[0] == "instruction"]
        parts = [question, *(text for text in between if isinstance(text, str) and text.strip())]
        question = [{"role": "user", "content": "\n".join(parts)}]
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    return before + as_turns(question, fields[0]) + as_turns(answer, fields[1])


def _filled(value: Any) -> bool:
    return bool(value.strip() if isinstance(value, str) else value)


def as_turns(value: Any, name: str) -> list[Turn]:
    """A conversation as {"role", "content"}, from that or from ShareGPT's {"from", "value"}.

    Raises:
        ValueError: no list of turns, a role that is not known, content that is no text.
    """
    if value is None or (isinstance(value, list) and not value):
        return []
    if not is_turns(value):
        raise ValueError(f"{name}: got {str(value)[:60]!r}, expected a list of role and content")
    return [_turn(turn, name) for turn in value]


def _turn(turn: Mapping[str, Any], name: str) -> Turn:
    if "role" in turn and "content" in turn:
        rest = {k: v for k, v in turn.items() if v is not None}
        content = turn["content"]
        return {**rest, "content": content if content is None else _text(content, name)}
    role = str(turn["from"]).lower()
    if role not in _ROLES:
        raise ValueError(f"{name}: got a turn from {turn['from']!r}, expected {', '.join(_ROLES)}")
    return {"role": _ROLES[role], "content": _text(turn.get("value"), name)}


def _text(content: Any, name: str) -> str:
    """A turn's text; of parts, their texts one after the other."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    odd = [part for part, text in zip(parts, texts, strict=True) if not isinstance(text, str)]
    if odd:
        got = odd[0].get("type") if isinstance(odd[0], Mapping) else type(odd[0]).__name__
        what = got if isinstance(content, list) else repr(content)[:60]
        raise ValueError(f"{name}: got a turn that holds {what}, expected text")
    return "".join(str(text) for text in texts)
