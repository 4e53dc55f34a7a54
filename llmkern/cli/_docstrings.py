"""Help texts from the docstrings of the functions and dataclasses that get the options."""

from __future__ import annotations

import inspect
import re

# The length up to which a further sentence or clause is shown.
_LONG = 110
_ENTRY = re.compile(r"    (\w+(?:, \w+)*): (.*)")
_ASIDE = re.compile(r" \(see [^()]*\)|, see `[^`]*`")
_REFERENCE = re.compile(r"(?:^|, )see `")
# What leaving an option away means is said of None where there is a keyword for it.
_UNSET = re.compile(r"None(?:: | is | takes )")


def entries(docstring: str | None, section: str) -> dict[str, str]:
    """Text of each entry of a section, by name; "a, b: ..." is the text of both.

    Args:
        docstring: in Google's style.
        section: "Args" or "Attributes".
    """
    lines = inspect.cleandoc(docstring or "").splitlines()
    if f"{section}:" not in lines:
        return {}
    found: dict[str, str] = {}
    names: list[str] = []
    for line in lines[lines.index(f"{section}:") + 1 :]:
        if line and not line.startswith(" "):
            break
        start = _ENTRY.fullmatch(line)
        if start:
            names = start[1].split(", ")
            found |= dict.fromkeys(names, start[2].strip())
        else:
            found |= {name: f"{found[name]} {line.strip()}".strip() for name in names}
    return found


def refers(text: str) -> bool:
    """Whether the text leaves it to another docstring to say what the option is."""
    return not text or _REFERENCE.search(text) is not None


def brief(text: str) -> str:
    """The text as a line of help: its first sentences and clauses, in the words of a command line.

    What holds if the option is not given is among them always.
    """
    shown, full = "", False
    for clause in re.split(r"(?<=[.;]) (?![^()]*\))", _ASIDE.sub("", text)):
        unset = _UNSET.match(clause)
        if unset:
            clause = f"by default {clause[unset.end() :]}"
        elif clause.startswith("None for "):
            clause = f"n{clause[1:]}"
        elif clause.startswith("None "):
            continue  # None keeps nothing, writes nothing: what one expects of an option not given
        elif full or (shown and len(shown) + len(clause) > _LONG):
            full = True
            continue
        if shown and shown[-1] not in ".;":
            shown += ";"
        shown += f" {clause[:1].upper() if shown.endswith('.') else clause[:1]}{clause[1:]}"
        shown = shown.strip()
    shown = shown.replace("`", "").rstrip(".;,: ")
    return f"{shown[:1].upper()}{shown[1:]}." if shown else ""
