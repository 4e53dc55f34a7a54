"""The cache of what tests compile: it knows when to compile again (tests/helpers/compiled.py)."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import compiled
import pytest


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source that includes a header, and a cache of its own."""
    if compiled.cxx() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(compiled, "CACHE", tmp_path / "cache")
    (tmp_path / "number.h").write_text("#define NUMBER 1\n")
    (tmp_path / "source.cpp").write_text('#include "number.h"\nint number() { return NUMBER; }\n')
    return tmp_path / "source.cpp"


def build(source: Path, *flags: str) -> tuple[int, bytes]:
    """When the object was written, and what is in it."""
    command = [compiled.cxx(), *flags, "-MMD", "-MF", "{deps}", "-c", source, "-o", "{out}"]
    path = compiled.compile_once("folder/object.o", command).path
    return path.stat().st_mtime_ns, path.read_bytes()


def test_what_did_not_change_is_not_compiled_again(source: Path) -> None:
    first = build(source)
    for path in (source, source.parent / "number.h"):
        os.utime(path)
    assert build(source) == first


@pytest.mark.parametrize("change", ["source", "header", "flag", "lost_object", "lost_manifest"])
def test_a_change_is_compiled(change: str, source: Path) -> None:
    when, before = build(source)
    flags = []
    if change == "source":
        source.write_text(source.read_text() + "int other() { return 2; }\n")
    elif change == "header":
        (source.parent / "number.h").write_text("#define NUMBER 7\n")
    elif change == "flag":
        flags = ["-DOTHER", "-g"]
    else:
        name = {"lost_object": "object.o", "lost_manifest": "manifest.json"}[change]
        next(compiled.CACHE.rglob(name)).unlink()
    again, after = build(source, *flags)
    assert again > when
    assert (after == before) == change.startswith("lost")


def test_a_mistake_is_told_each_time_and_the_report_is_kept(source: Path) -> None:
    good = source.read_text()
    source.write_text("int number() { return NUMBER; }\n")
    for _ in range(2):
        with pytest.raises(AssertionError, match="NUMBER"):
            build(source)
    source.write_text('#warning "look here"\n' + good)
    command = [compiled.cxx(), "-MMD", "-MF", "{deps}", "-c", source, "-o", "{out}"]
    reports = {compiled.compile_once("report.o", command).report for _ in range(2)}
    assert len(reports) == 1
    assert "look here" in reports.pop()


def test_who_asks_at_once_gets_one_object(source: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: build(source), range(8)))) == 1
