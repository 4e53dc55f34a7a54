"""What tests compile, kept under build/tests: compiled again only when what went into it has changed.

An entry is a folder with what the compiler wrote, what it printed, and a manifest: the command, the
compiler's version, and a hash of every file that was read. Workers of pytest-xdist and other runs may
ask for the same entry at once; one of them compiles it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "tests"
# What an extension module is built for: several Pythons may share a tree.
PYTHON = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"


@dataclass(frozen=True)
class Compiled:
    path: Path
    report: str  # what the compiler printed


def compile_once(
    name: str,
    command: Sequence[str | Path],
    inputs: Iterable[Path] | None = None,
    version: str | None = None,
    env: dict[str, str] | None = None,
) -> Compiled:
    """The output of `command`, made now or by an earlier call.

    Args:
        name: path of the output below build/tests, e.g. "cuda/w4a16_gemm.o"; one command per name.
        command: argument vector; "{out}" stands for the output's path, "{deps}" for the file where
            the compiler lists what it read, as make's rule.
        inputs: the files that are read, where the command does not list them.
        version: of the compiler; by default what `command[0] --version` prints.
        env: environment of the command, by default this process's.

    Raises:
        AssertionError: the command failed; the message is what it printed.
    """
    command = [str(argument) for argument in command]
    folder = CACHE / f"{name}.d"
    folder.mkdir(parents=True, exist_ok=True)
    out, manifest, deps = folder / Path(name).name, folder / "manifest.json", folder / "deps"
    key = json.dumps([command, version or _version(command[0])])
    with FileLock(folder / "lock"):
        if out.exists() and manifest.exists():
            made = json.loads(manifest.read_text())
            if made["key"] == key and all(_hash(path) == h for path, h in made["files"].items()):
                return Compiled(out, made["report"])
        manifest.unlink(missing_ok=True)
        places = {"{out}": str(out), "{deps}": str(deps)}
        arguments = [places.get(argument, argument) for argument in command]
        done = subprocess.run(arguments, capture_output=True, text=True, env=env, cwd=ROOT)
        report = done.stdout + done.stderr
        assert done.returncode == 0, report
        read = _listed(deps) if inputs is None else [str(path) for path in inputs]
        made = {"key": key, "report": report, "files": {path: _hash(path) for path in read}}
        manifest.write_text(json.dumps(made))  # last: without it the entry does not count
    return Compiled(out, report)


def _listed(deps: Path) -> list[str]:
    """Prerequisites in a rule that a compiler wrote with -MMD."""
    _, _, files = deps.read_text().replace("\\\n", " ").partition(":")
    return shlex.split(files)


def _hash(path: str) -> str | None:
    file = ROOT / path
    if not file.is_file():
        return None
    return _hash_of(str(file), file.stat().st_mtime_ns)


@cache
def _hash_of(path: str, mtime: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@cache
def _version(tool: str) -> str:
    return subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout


def cxx() -> str | None:
    """The host's C++ compiler: $CXX, or the first that is there."""
    names = filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++"))
    return next((name for name in names if shutil.which(name.split()[0])), None)


def in_parallel(jobs: Sequence[tuple[object, ...]]) -> list[Compiled]:
    """`compile_once(*job)` for each job, on all cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda job: compile_once(*job), jobs))


def link(name: str, command: Sequence[str | Path], objects: Sequence[Compiled]) -> Path:
    """`command` with the objects' paths behind it: a shared library or a program."""
    files = [compiled.path for compiled in objects]
    return compile_once(name, [*command, *files, "-o", "{out}"], files).path


def load_extension(name: str, path: Path) -> ModuleType:
    """The extension module `name` in the file `path`."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
