"""Rules of the source tree that no linter knows: complete rows, dependency direction, sizes, names."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llmkern
from llmkern import _backends, formats, nn, ops, wire
from llmkern.formats.lut4 import CodebookFormat

ROOT = Path(__file__).resolve().parent.parent
PYTHON_FILES = [
    path
    for folder in ("llmkern", "triton_kernels", "bench", "scripts")
    for path in (ROOT / folder).rglob("*.py")
]
CPP_FILES = [
    path for suffix in ("h", "cpp", "cu", "cuh") for path in (ROOT / "csrc").rglob(f"*.{suffix}")
]

# What each part of the package may import of ours besides `_dtypes` and `_json`, from the ground floor
# up. `demo` sits on top; `cli` and the folder `bench` may import all of it, and nothing imports them.
MAY_IMPORT = {
    "_version": set(),
    "_dtypes": set(),
    "_json": set(),
    "_backends": set(),
    "_memory": {"_backends"},
    "_files": set(),
    "_progress": set(),
    "assets": set(),
    "models": set(),
    "triton_kernels": set(),
    "formats": {"_memory"},
    "reference": {"formats"},
    "ops": {"_backends", "formats", "reference", "triton_kernels"},
    "env": {"_backends", "_version", "formats", "ops"},
    "testing": {"formats", "ops", "reference"},
    "nn": {"_backends", "formats", "models", "ops"},
    "patch": {"formats", "models", "nn", "wire"},
    "masks": {"models"},
    "train": {"_files", "_progress"},
    "calibrate": {"_progress", "assets", "models", "ops"},
    "evaluate": {"_progress", "calibrate", "models", "nn", "reference"},
    "wire": {"formats", "models", "nn"},
    "hf": {"_files", "formats", "masks", "models", "nn", "patch", "wire"},
    "drive": {
        "_files",
        "_progress",
        "_version",
        "calibrate",
        "formats",
        "masks",
        "models",
        "nn",
        "ops",
        "patch",
    },
    "quantize": {"calibrate", "drive", "formats", "masks", "models", "nn", "ops", "patch", "wire"},
    "prune": {"calibrate", "drive", "evaluate", "masks", "models", "ops", "patch", "train"},
    "distill": {
        "_progress",
        "calibrate",
        "drive",
        "masks",
        "models",
        "nn",
        "ops",
        "patch",
        "prune",
        "reference",
        "train",
    },
    "report": set(),
    "pipeline": {
        "_files",
        "_progress",
        "assets",
        "calibrate",
        "distill",
        "drive",
        "env",
        "evaluate",
        "formats",
        "hf",
        "models",
        "nn",
        "patch",
        "prune",
        "quantize",
        "report",
        "train",
        "wire",
    },
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


def imports(path: Path) -> set[str]:
    """Dotted names of what a file imports, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "llmkern":
            names |= {f"llmkern.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return names


def imports_of_ours(path: Path) -> set[str]:
    """Parts of llmkern that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("llmkern.")}


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_dependencies_point_one_way(part: str) -> None:
    base = ROOT / "triton_kernels" if part == "triton_kernels" else ROOT / "llmkern" / part
    files = base.rglob("*.py") if base.is_dir() else [base.with_suffix(".py")]
    for path in files:
        extra = imports_of_ours(path) - MAY_IMPORT[part] - {part, "_dtypes", "_json"}
        assert not extra, f"{path.relative_to(ROOT)} imports llmkern.{', llmkern.'.join(extra)}"


@pytest.mark.parametrize("folder", ["llmkern", "triton_kernels", "scripts"])
def test_nothing_imports_the_command_line_or_the_benchmarks(folder: str) -> None:
    benchmarks = {"bench", *(path.stem for path in (ROOT / "bench").glob("*.py"))}
    for path in (ROOT / folder).rglob("*.py"):
        assert not benchmarks & {name.split(".")[0] for name in imports(path)}, path
        if path.parent.name != "cli" and path.name != "__main__.py":
            assert "cli" not in imports_of_ours(path), path


def all_methods() -> list[Any]:
    drivers = ("prune", "quantize", "distill")
    return [m for d in drivers for m in importlib.import_module(f"llmkern.{d}").METHODS]


def constants(node: ast.AST) -> set[object]:
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}


def asks_for_a_method(node: ast.AST, names: set[str]) -> bool:
    """Whether a comparison is one of a method's name."""
    if not isinstance(node, ast.Compare):
        return False
    sides = [node.left, *node.comparators]
    named = [side for side in sides if constants(side) & names]
    others = " ".join(ast.unparse(side) for side in sides if side not in named)
    return bool(named) and re.search(r"method|kind\.name|\bname\b", others) is not None


def test_no_method_is_asked_for_by_its_name() -> None:
    names = {method.name for method in all_methods()}
    asking = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in PYTHON_FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if asks_for_a_method(node, names)
    ]
    assert not asking


def test_that_a_question_for_a_method_is_seen() -> None:
    for code in ("self.method == 'gptq'", "method in ('nf4', 'fp4')", "kind.name != 'depth'"):
        assert asks_for_a_method(ast.parse(code, mode="eval").body, {"gptq", "nf4", "depth"})
    code = "options.importance == 'magnitude'"
    assert not asks_for_a_method(ast.parse(code, mode="eval").body, {"magnitude"})


def classes_asked_for(tree: ast.AST) -> set[str]:
    """Names of the classes in isinstance(x, ...) and type(x) is ..."""
    found: set[str] = set()
    for node in ast.walk(tree):
        kinds: list[ast.AST] = []
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            kinds = list(node.args[1:])
        elif isinstance(node, ast.Compare) and ast.unparse(node.left).startswith("type("):
            kinds = list(node.comparators)
        found |= {n.id for kind in kinds for n in ast.walk(kind) if isinstance(n, ast.Name)}
        found |= {n.attr for kind in kinds for n in ast.walk(kind) if isinstance(n, ast.Attribute)}
    return found


def test_no_ladder_asks_which_module_format_or_method_it_holds() -> None:
    kinds = {*nn.PACKED, nn.PackedLinear, *formats.FORMATS, CodebookFormat}
    kinds |= {type(entry) for entry in wire.WIRES}
    for method in all_methods():
        kinds |= {method.options, type(getattr(method, "work", method))}
    places = {kind: Path(inspect.getfile(kind)).resolve() for kind in kinds}
    for path in PYTHON_FILES:
        own = {kind for kind in kinds if places[kind] == path.resolve()}
        own |= {base for kind in own for base in kind.__mro__}  # a module may stand for its base
        elsewhere = {kind.__name__ for kind in kinds - own}
        asked = classes_asked_for(ast.parse(path.read_text())) & elsewhere
        assert not asked, f"{path.relative_to(ROOT)} asks for {asked}"


def test_kernels_know_nothing_of_torch() -> None:
    offenders = [
        path
        for path in CPP_FILES
        if "#include <torch" in path.read_text() or "ATen/" in path.read_text()
    ]
    assert not offenders


def test_files_are_short_enough_to_read() -> None:
    for path in PYTHON_FILES + CPP_FILES:
        lines = len(path.read_text().splitlines())
        assert lines <= (500 if path.suffix == ".py" else 600), f"{path}: {lines} lines"


def test_functions_are_short_and_take_few_parameters() -> None:
    for path in PYTHON_FILES:
        # A torch op's arguments are spelled out in its schema, and kernels take what they take.
        spelled_out = path.parts[-2] in ("ops", "reference", "triton_kernels")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                jit = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
                docstring = ast.get_docstring(node, clean=False) or ""
                lines = node.end_lineno - node.body[0].lineno + 1 - len(docstring.splitlines())
                where = f"{path}:{node.lineno} {node.name}"
                assert lines <= (200 if jit else 60), f"{where}: {lines} lines"
                # The options of a command are declared as its parameters.
                positional = sum("Annotated" not in ast.unparse(a) for a in node.args.args)
                assert spelled_out or positional <= 8, f"{where}: {positional} parameters"


@pytest.mark.parametrize("driver", ["prune", "quantize", "distill"])
def test_every_method_of_a_driver_is_in_the_comparison(driver: str) -> None:
    methods = importlib.import_module(f"llmkern.{driver}").METHODS
    assert not [method.name for method in methods if not method.compared]
    labels = [label for method in methods for label in method.compared]
    assert len(labels) == len(set(labels))


def test_no_test_or_bench_folder_is_a_package() -> None:
    assert not [p for d in ("tests", "bench") for p in (ROOT / d).rglob("__init__.py")]
    assert not (ROOT / "conftest.py").exists()


@pytest.mark.slow
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


@pytest.mark.slow
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
