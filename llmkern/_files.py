"""Files that are there whole or not at all, also after a crash."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a text file: a process killed at any instant leaves the old one, none, or all of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    sync_entry(partial)
    os.replace(partial, path)
    sync_entry(path.parent)


def sync_tree(directory: Path) -> None:
    """Bring a directory and all below it to the disk: a rename may get there before what it names."""
    for path in (*directory.rglob("*"), directory):
        sync_entry(path)


def sync_entry(path: Path) -> None:
    """Bring one file, or the names in one directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
