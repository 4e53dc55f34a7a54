"""Rules for every test: fixed seed, poisoned allocations, GPU tests that cannot be skipped unnoticed."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter here. Triton reads this when it is first imported.
    os.environ["TRITON_INTERPRET"] = "1"


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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if LEFT_OUT:
        terminalreporter.write_line(
            f"left out, for want of {', '.join(MISSING)}: {', '.join(sorted(LEFT_OUT))}"
        )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-gpu", action="store_true", help="fail GPU tests where there is no CUDA device"
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
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
