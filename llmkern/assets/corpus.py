"""The texts that the bundled model was trained on: the running interpreter's standard library.

Sources and the language reference, split by a hash of each document's name, so that whatever Python
this is, what the bundled model was held out from stays held out.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_PERCENT = 4

# Tests are repetitive, and tables of characters or numbers would only waste a small model.
SKIPPED_PARTS = {"test", "tests", "idle_test", "site-packages", "encodings", "__pycache__"}
SKIPPED_FILES = re.compile(
    r"stringprep\.py|html/entities\.py|re/_casefix\.py|_sysconfigdata.*\.py|pydoc_data/topics\.py"
)


def documents() -> Iterator[tuple[str, str]]:
    """Name and text of every document, in a stable order and without duplicates."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    found = {}
    for path in stdlib.rglob("*.py"):
        name = path.relative_to(stdlib).as_posix()
        if SKIPPED_PARTS.isdisjoint(name.split("/")) and not SKIPPED_FILES.fullmatch(name):
            found[name] = path.read_text(encoding="utf-8", errors="ignore")

    from pydoc_data.topics import topics

    for topic, text in topics.items():
        found[f"pydoc_data/topics/{topic}.txt"] = text

    seen = set()
    for name, text in sorted(found.items()):
        text = text.strip() + "\n"
        if len(text) > 1 and text not in seen:
            seen.add(text)
            yield name, text


def stable_hash(name: str) -> int:
    """A document's name as the same number on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def is_held_out(name: str) -> bool:
    """Whether a document is for measuring: by its name, so that adding one never moves another."""
    return stable_hash(name) % 100 < HELD_OUT_PERCENT


def training_text() -> str:
    """All documents that the bundled model may learn from, about 10 MB."""
    return "\n\n".join(text for name, text in documents() if not is_held_out(name))
