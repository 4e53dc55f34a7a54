"""Prompts, and answers to them, from files of one JSON object (or one text) a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# A text, or the turns of a conversation: {"role", "content"}.
Prompt = str | list[dict[str, str]]

# What may hold prompt and answer in a line of JSON.
_PAIRS = (("prompt", "answer"), ("prompt", "completion"), ("instruction", "output"))


class Pair(NamedTuple):
    """A prompt and the answer to it.

    Attributes:
        prompt, answer: texts; the prompt may be a conversation.
        finished: the answer ends here; otherwise it was cut off.
    """

    prompt: Prompt
    answer: str
    finished: bool = True


def read_prompts(source: str | Path | Sequence[str], argument: str = "prompts") -> list[str]:
    """Prompts, in order.

    Args:
        source: path of a file, a line a prompt: in .jsonl files {"prompt": "..."}, otherwise the line
            itself; or the prompts.
        argument: what error messages call it.

    Raises:
        ValueError: no such file, no prompt in it, a bad line (named by its number), an empty prompt.
    """
    if isinstance(source, (str, Path)):
        path = _existing(source, argument)
        if path.suffix == ".jsonl":
            found = [_text(entry, "prompt", where) for where, entry in json_lines(path, argument)]
        else:
            found = [line for line in _read(path, argument).splitlines() if line.strip()]
    else:
        found = list(source)
        for i, prompt in enumerate(found):
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(f"{argument}: got {prompt!r} as number {i}, expected a text")
    if not found:
        raise ValueError(f"{argument}: got no prompt in {source!s}, expected some")
    return found


def read_pairs(path: str | Path, argument: str = "answers") -> list[Pair]:
    """Prompts with their answers, in order.

    Args:
        path: a file of one JSON object a line: {"prompt", "answer"}, {"prompt", "completion"},
            {"instruction", "output"} (and "input" or not) or {"messages": [{"role", "content"}, ...]},
            the last of which is the assistant's.
        argument: what error messages call it.

    Raises:
        ValueError: no such file, no answer in it, a bad line (named by its number).
    """
    file = _existing(path, argument)
    found = [_pair(entry, where) for where, entry in json_lines(file, argument)]
    if not found:
        raise ValueError(f"{argument}: got no answer in {file}, expected some")
    return found


def json_lines(path: Path, argument: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(Where it stands, object) of each line that is not empty.

    Raises:
        ValueError: a line that is no JSON object.
    """
    for number, line in enumerate(_read(path, argument).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{argument}: {path}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: got no JSON ({error}), expected an object") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: got {type(entry).__name__}, expected a JSON object")
        yield where, entry


def _pair(entry: dict[str, Any], where: str) -> Pair:
    if "messages" in entry:
        return _conversation(entry["messages"], where)
    for question, answer in _PAIRS:
        if question in entry and answer in entry:
            prompt = _text(entry, question, where)
            if question == "instruction" and entry.get("input"):
                prompt = f"{prompt}\n{_text(entry, 'input', where)}"
            finished = entry.get("finished", True)
            if not isinstance(finished, bool):
                raise ValueError(f"{where}: finished: got {finished!r}, expected true or false")
            return Pair(prompt, _text(entry, answer, where), finished)
    known = ", ".join(f"{a} and {b}" for a, b in _PAIRS)
    raise ValueError(f"{where}: got {', '.join(entry) or 'no keys'}, expected {known}, or messages")


def _conversation(messages: Any, where: str) -> Pair:
    good = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
    )
    if not good or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{where}: messages: got {str(messages)[:60]!r}, expected a list of role and content, the "
            "last of them the assistant's"
        )
    turns = [{"role": m["role"], "content": _text(m, "content", where)} for m in messages]
    answer = turns.pop()["content"]
    if len(turns) == 1 and turns[0]["role"] == "user":
        return Pair(turns[0]["content"], answer)
    return Pair(turns, answer)


def _text(entry: dict[str, Any], key: str, where: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {key}: got {value!r}, expected a text")
    return value


def _existing(path: str | Path, argument: str) -> Path:
    if not Path(path).is_file():
        raise ValueError(f"{argument}: got {str(path)!r}, expected an existing file")
    return Path(path)


def _read(path: Path, argument: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{argument}: got {path}, expected UTF-8 text ({error.reason})") from error
