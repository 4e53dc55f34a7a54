"""Prompts, and answers to them, from files of rows (or of one text a line)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llmkern.calibrate.data import rows

# A text, or the turns of a conversation: {"role", "content"}.
Prompt = str | list[dict[str, str]]


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
        source: path of a file of rows (.jsonl, .json, .csv, .parquet and others, see
            `llmkern.calibrate.data`) with a field prompt, or of text, a line a prompt; or the prompts.
        argument: what error messages call it.

    Raises:
        ValueError: no such file, no prompt in it, a bad line (named by its number), an empty prompt.
    """
    if isinstance(source, (str, Path)):
        path = _existing(source, argument)
        if rows.has_rows(path):
            entries = _objects(rows.read_rows(path, argument), path, argument)
            found = [_text(entry, "prompt", where) for where, entry in entries]
        else:
            found = [ln for ln in rows.read_text(path, argument).split("\n") if ln.strip()]
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
        path: a file of rows, of JSON lines if its name does not say: {"prompt", "answer"}, {"prompt",
            "completion"}, {"instruction", "output"} (and "input" or not), {"messages": [{"role",
            "content"}, ...]} or {"conversations": [{"from", "value"}, ...]}, the last of which is the
            assistant's.
        argument: what error messages call it.

    Raises:
        ValueError: no such file, no answer in it, a bad line (named by its number).
    """
    file = _existing(path, argument)
    read = rows.read_rows if rows.has_rows(file) else rows.json_lines
    entries = _objects(read(file, argument), file, argument)
    found = [_pair(entry, where) for where, entry in entries]
    if not found:
        raise ValueError(f"{argument}: got no answer in {file}, expected some")
    return found


def json_lines(path: Path, argument: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(Where it stands, object) of each line that is not empty.

    Raises:
        ValueError: a line that is no JSON object.
    """
    return _objects(rows.json_lines(path, argument), path, argument)


def _objects(
    found: Iterable[rows.Row], path: Path, argument: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, entry in found:
        where = f"{argument}: {path}, {place}"
        if not isinstance(entry, Mapping):
            raise ValueError(f"{where}: got {type(entry).__name__}, expected a JSON object")
        yield where, dict(entry)


def _pair(entry: dict[str, Any], where: str) -> Pair:
    name = next((name for name in rows.CONVERSATIONS if name in entry), None)
    if name is not None:
        return _conversation(entry, (name,), where)
    for question, answer in rows.PAIRS:
        if question in entry and answer in entry:
            if rows.is_turns(entry[question]) or rows.is_turns(entry[answer]):
                return _conversation(entry, (question, answer), where)
            prompt = _text(entry, question, where)
            between = [c for c in rows.CONTEXTS if question == "instruction" and entry.get(c)]
            prompt = "\n".join([prompt, *(_text(entry, name, where) for name in between)])
            finished = entry.get("finished", True)
            if not isinstance(finished, bool):
                raise ValueError(f"{where}: finished: got {finished!r}, expected true or false")
            return Pair(prompt, _text(entry, answer, where), finished)
    known = ", ".join(f"{a} and {b}" for a, b in rows.PAIRS)
    raise ValueError(f"{where}: got {', '.join(entry) or 'no keys'}, expected {known}, or messages")


def _conversation(entry: dict[str, Any], fields: tuple[str, ...], where: str) -> Pair:
    try:
        turns = rows.turns_of(entry, fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}, the last of them the assistant's") from error
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise ValueError(
            f"{where}: {fields[0]}: got {str(entry[fields[0]])[:60]!r}, expected a list of role and "
            "content, the last of them the assistant's"
        )
    turns = [{"role": t["role"], "content": _text(t, "content", where)} for t in turns]
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
