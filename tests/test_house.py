"""Rules of the source tree that no linter knows: complete rows, dependency direction, sizes, names."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import llmkern
from llmkern import _backends, ops

ROOT = Path(__file__).resolve().parent.parent
PYTHON_FILES = [
    path
    for folder in ("llmkern", "triton_kernels", "bench", "scripts")
    for path in (ROOT / folder).rglob("*.py")
]
CPP_FILES = [
    path for suffix in ("h", "cpp", "cu", "cuh") for path in (ROOT / "csrc").rglob(f"*.{suffix}")
]

# What each part of the package may import of ours, besides `_dtypes`; `cli`, `demo`, `hf` and `env` sit
# on top.
MAY_IMPORT = {
    "_backends": set(),
    "_version": set(),
    "_dtypes": set(),
    "formats": {"_memory"},
    "reference": {"formats"},
    "ops": {"_backends", "formats", "reference", "triton_kernels"},
    "triton_kernels": set(),
    "nn": {"_backends", "formats", "models", "ops"},
    "patch": {"formats", "models", "nn", "ops"},
    "assets": set(),
    "models": set(),
    "_memory": {"_backends"},
    "_files": set(),
    "_journal": {"_files", "_version", "models", "nn"},
    "calibrate": {"assets", "formats", "models", "ops"},
    "_drive": {"_journal", "calibrate", "models", "nn", "ops", "patch"},
    "masks": {"models"},
    "quantize": {
        "_drive",
        "_journal",
        "calibrate",
        "formats",
        "masks",
        "models",
        "nn",
        "ops",
        "patch",
    },
    "prune": {
        "_drive",
        "_journal",
        "calibrate",
        "evaluate",
        "masks",
        "models",
        "nn",
        "ops",
        "patch",
        "train",
    },
    "evaluate": {"calibrate", "formats", "models", "nn"},
    "report": set(),
    "train": {"_files"},
    "distill": {
        "_drive",
        "calibrate",
        "masks",
        "models",
        "nn",
        "ops",
        "patch",
        "prune",
        "reference",
        "train",
    },
    "pipeline": {
        "_drive",
        "_files",
        "_journal",
        "_version",
        "assets",
        "calibrate",
        "distill",
        "env",
        "evaluate",
        "formats",
        "hf",
        "masks",
        "models",
        "nn",
        "patch",
        "prune",
        "quantize",
        "report",
        "train",
    },
    "testing": {"formats", "ops", "reference"},
}


@pytest.mark.parametrize("op", ops.OPS)
def test_op_row_is_complete(op: str) -> None:
    expected = [
        f"llmkern/ops/{op}.py",
        f"csrc/cpu/{op}.cpp",
        f"csrc/cuda/{op}.cu",
        f"triton_kernels/{op}.py",
        f"tests/ops/test_{op}.py",
    ]
    missing = [path for path in expected if not (ROOT / path).is_file()]
    assert not missing


@pytest.mark.parametrize("op", ops.OPS)
def test_op_offers_every_backend_in_the_documented_order(op: str) -> None:
    module = sys.modules[f"llmkern.ops.{op}"]
    assert tuple(backend.name for backend in module.BACKENDS) == _backends.NAMES


def imports_of_ours(path: Path) -> set[str]:
    """Parts of llmkern that a file imports, at any depth of its code."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
            if node.module == "llmkern":
                names = [f"llmkern.{alias.name}" for alias in node.names]
        parts |= {name.split(".")[1] for name in names if name.startswith("llmkern.")}
    return parts


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_dependencies_point_one_way(part: str) -> None:
    base = ROOT / "triton_kernels" if part == "triton_kernels" else ROOT / "llmkern" / part
    files = base.rglob("*.py") if base.is_dir() else [base.with_suffix(".py")]
    for path in files:
        extra = imports_of_ours(path) - MAY_IMPORT[part] - {part, "_dtypes"}
        assert not extra, f"{path.relative_to(ROOT)} imports llmkern.{', llmkern.'.join(extra)}"


def test_kernels_know_nothing_of_torch() -> None:
    offenders = [
        path
        for path in CPP_FILES
        if "#include <torch" in path.read_text() or "ATen/" in path.read_text()
    ]
    assert not offenders


@pytest.mark.parametrize("path", PYTHON_FILES + CPP_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_is_short_enough_to_read(path: Path) -> None:
    limit = 600 if path.suffix in (".cuh", ".cu", ".cpp", ".h") else 500
    assert len(path.read_text().splitlines()) <= limit


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_are_short_and_take_few_parameters(path: Path) -> None:
    # A torch op's arguments are spelled out in its schema, and kernels take what they take.
    spelled_out = path.parts[-2] in ("ops", "reference", "triton_kernels")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            jit = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            docstring = ast.get_docstring(node, clean=False) or ""
            lines = node.end_lineno - node.body[0].lineno + 1 - len(docstring.splitlines())
            assert lines <= (200 if jit else 60), f"{path}:{node.lineno} {node.name}: {lines} lines"
            # The options of a command are declared as its parameters.
            positional = sum("Annotated" not in ast.unparse(a) for a in node.args.args)
            assert spelled_out or positional <= 8, f"{path}:{node.lineno} {node.name}: {positional}"


@pytest.mark.parametrize("driver", ["prune", "quantize", "distill"])
def test_every_method_of_a_driver_is_in_the_comparison(driver: str) -> None:
    module = importlib.import_module(f"llmkern.{driver}")
    shown = {options["method"] for options in module.COMPARED.values()}
    assert shown == set(module.METHODS), f"llmkern/{driver}/_compared.py"


def test_no_test_or_bench_folder_is_a_package() -> None:
    assert not [p for d in ("tests", "bench") for p in (ROOT / d).rglob("__init__.py")]
    assert not (ROOT / "conftest.py").exists()


def test_import_brings_torch_only() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import llmkern; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before} & "
        "{'transformers', 'triton', 'matplotlib', 'accelerate', 'datasets', 'typer'}))"
    )
    root = Path(llmkern.__file__).resolve().parent.parent
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert result.stdout.strip() == ""


def test_kernel_folder_does_not_pass_for_openais_package() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import triton_kernels"], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode != 0
    assert "ModuleNotFoundError" in result.stderr


def test_tables_of_the_documents_are_those_of_the_results() -> None:
    script = ROOT / "scripts" / "update_tables.py"
    result = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
