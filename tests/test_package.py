"""What gets built and shipped: the wheel's contents, building without a compiler, the source archive."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def build_wheel(folder: Path, **env: str) -> tuple[set[str], str]:
    """Names in the wheel built from this tree, and what the build printed."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps"]
    result = subprocess.run(
        [*command, "-w", str(folder), str(ROOT)],
        env={**os.environ, "LLMKERN_BUILD_CUDA": "0", **env},
        capture_output=True,
        text=True,
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist()), output


def test_wheel_holds_only_llmkern(tmp_path: Path) -> None:
    names, _ = build_wheel(tmp_path)
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"llmkern"}
    assert "llmkern/triton_kernels/w4a16_gemm.py" in names
    assert "llmkern/assets/stdlib-llama/model.safetensors" in names
    assert "llmkern/py.typed" in names
    assert "llmkern/report/assets/report.html.j2" in names
    assert any(name.startswith("llmkern/_cpu.") for name in names)


def test_without_a_compiler_the_package_still_builds_and_says_so_once(tmp_path: Path) -> None:
    names, output = build_wheel(tmp_path, PATH=str(tmp_path), CXX="")
    assert not any(name.startswith(("llmkern/_cpu.", "llmkern/_cuda.")) for name in names)
    assert "llmkern/__init__.py" in names
    assert output.count("no C++ compiler found") == 1


def test_cuda_build_that_is_demanded_and_impossible_fails(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)],
        env={**os.environ, "LLMKERN_BUILD_CUDA": "1", "PATH": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "LLMKERN_BUILD_CUDA=1" in result.stderr


def test_source_archive_can_be_built_from(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {"csrc/llmkern.h", "csrc/cpu/kernels.h", "setup.py"} <= names
    assert "triton_kernels/w4a16_gemm.py" in names


@pytest.mark.parametrize("missing", ["llmkern._cpu", "triton"])
def test_package_works_without_optional_parts(missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "import torch\n"
        "from llmkern import ops\n"
        "q = torch.randint(0, 100, (8, 4), dtype=torch.int32)\n"
        "y = ops.w4a16_gemm(torch.ones(2, 32), q, torch.ones(8, 1), group_size=32)\n"
        "w = ops.dequantize_int4(q, torch.ones(8, 1), group_size=32)\n"
        "assert torch.equal(y, torch.ones(2, 32) @ w.T), (y, w)\n"
    )
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})
