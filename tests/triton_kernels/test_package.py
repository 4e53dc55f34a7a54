"""The folder triton_kernels: who may import it, and how its tests run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    # PYTHONPATH puts the folder that holds triton_kernels on sys.path.
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


@pytest.mark.skipif(not (ROOT / "triton_kernels").is_dir(), reason="tests without a source tree")
def test_the_folder_does_not_answer_for_the_public_package_of_its_name() -> None:
    result = run("import triton_kernels")
    assert result.returncode == 1
    assert "ModuleNotFoundError: No module named 'triton_kernels'" in result.stderr


def test_importing_llmkern_imports_no_triton() -> None:
    code = "import sys, llmkern, llmkern.ops; sys.exit('triton' in sys.modules)"
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_without_a_gpu_the_kernels_are_interpreted() -> None:
    from llmkern.triton_kernels import w4a16_gemm

    kind = type(w4a16_gemm.w4a16_gemm_tile_kernel).__name__
    expected = "JITFunction" if torch.cuda.is_available() else "InterpretedFunction"
    assert kind == expected


def test_cpu_tensors_are_refused_without_the_interpreter() -> None:
    code = (
        "import torch, llmkern; from llmkern.ops import hessian_update\n"
        "llmkern.use_backend('triton'); hessian_update(torch.zeros(4, 4), torch.ones(2, 4), 1.0)"
    )
    result = run(code, TRITON_INTERPRET="0")
    assert result.returncode == 1
    assert "NotImplementedError" in result.stderr
    assert "tensors are on cpu" in result.stderr
