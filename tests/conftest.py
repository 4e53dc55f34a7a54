"""Rules for every test: fixed seed, poisoned allocations, GPU tests that cannot be skipped unnoticed.

Under pytest-xdist (`make test`) each worker has its share of the cores.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # OpenMP reads these when torch is imported; processes that tests start inherit them. Threads that
    # wait must not spin: another worker needs the core.
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter here. Triton reads this when it is first imported.
    os.environ["TRITON_INTERPRET"] = "1"


if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import settings

    # The same examples in every run: bounds are made of torch's own error, and of one single output that
    # is a matter of luck.
    settings.register_profile("repeatable", derandomize=True)
    settings.load_profile("repeatable")

# A GPU machine without network may lack these: its run leaves out the files that need them, and says so.
MISSING = [
    name for name in ("hypothesis", "transformers") if importlib.util.find_spec(name) is None
]
LEFT_OUT: list[str] = []


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if MISSING and collection_path.name.startswith("test_"):
        imports = rf"^(from|import) ({'|'.join(MISSING)})\b"
        if re.search(imports, collection_path.read_text(encoding="utf-8"), re.MULTILINE):
            LEFT_OUT.append(collection_path.name)
            return True
    return None


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes give no name: gzip writes the time into them, and workers have to collect the same tests."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_finish() -> None:
    """Modules are here to stay: each gc.collect() of accelerate's would walk them for half a second."""
    if "hypothesis" not in MISSING:
        importlib.import_module(
            "hypothesis"
        )  # which looks for who refers to what, and so comes first
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # at exit modules go as ever, or Triton's bindings complain of leaks


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # pytest-xdist's way from a worker to the terminal
        session.config.workeroutput["left_out"] = LEFT_OUT


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    LEFT_OUT.extend(set(getattr(node, "workeroutput", {}).get("left_out", ())) - set(LEFT_OUT))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if LEFT_OUT:
        terminalreporter.write_line(
            f"left out, for want of {', '.join(MISSING)}: {', '.join(sorted(LEFT_OUT))}"
        )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-gpu", action="store_true", help="fail GPU tests where there is no CUDA device"
    )
    parser.addoption(
        "--update-models",
        action="store_true",
        help="write what tests/real/test_architectures.py finds into its outcomes.json",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or config.getoption("--require-gpu"):
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Seed 0, and NaN (or the largest integer) in every buffer that torch.empty hands out."""
    torch.manual_seed(0)
    # As use_deterministic_algorithms, which would import the whole compiler of torch.
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run `llmkern ARGS...` in this process: (exit code, stdout, stderr)."""

    def call(*args: object) -> tuple[int, str, str]:
        from llmkern.cli import main

        monkeypatch.setattr(sys, "argv", ["llmkern", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), *capsys.readouterr()

    return call
