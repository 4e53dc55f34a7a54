"""Files that are there whole or not at all, also after a crash."""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import suppress
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


def check_writable(path: Path, argument: str | None = None) -> None:
    """Refuse a path where no file or directory can be made; nothing stays behind.

    Permissions alone do not tell: of a superuser, of a file system that is read-only, full or no real
    one, and of names that are too long. So something is made, and taken away again.

    Args:
        path: of the file or directory that will be made, or replaced from beside it.
        argument: what the caller calls it, for the message.

    Raises:
        OSError: it cannot be made; says why.
    """
    shown = str(path) if argument is None else f"{argument}: got {path}"
    place, below = path.absolute().parent, [path.name]
    while not os.path.lexists(place):
        place, below = place.parent, [place.name, *below]
    if not place.is_dir():
        raise NotADirectoryError(f"{shown}: {place} is no directory, expected one to write in")
    probe = place / f"{below[0]}.partial-{secrets.token_hex(4)}"
    made: list[Path] = []
    try:
        for count in range(1, len(below) + 1):
            directory = probe.joinpath(*below[1:count])
            directory.mkdir()
            made.append(directory)
        (probe / "probe").write_bytes(b"0")
    except OSError as error:
        why = error.strerror or str(error)
        raise OSError(f"{shown}: nothing can be written in {place} ({why})") from error
    finally:
        with suppress(OSError):
            (probe / "probe").unlink(missing_ok=True)
            for directory in reversed(made):
                directory.rmdir()


def free_space(path: Path) -> tuple[Path, int]:
    """The directory that is there and in which a path will be made, and the free bytes of its disk."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return place, shutil.disk_usage(place).free


def check_space(path: Path, need: int) -> None:
    """Refuse a place on a disk without room for so many bytes.

    Raises:
        OSError: there is less.
    """
    _, free = free_space(path)
    if need > free:
        raise OSError(
            f"{path}: got {free / 2**30:.2f} GiB of free space, expected at least {need / 2**30:.2f} GiB "
            "for the model"
        )
