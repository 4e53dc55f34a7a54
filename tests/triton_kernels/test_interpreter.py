"""Where the Triton kernels run: interpreted without a GPU, and only where they are asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def test_without_a_gpu_the_kernels_are_interpreted() -> None:
    from llmkern.triton_kernels import gemm_common

    kind = type(gemm_common.tile_kernel).__name__
    expected = "JITFunction" if torch.cuda.is_available() else "InterpretedFunction"
    assert kind == expected


@pytest.mark.slow
def test_cpu_tensors_are_refused_without_the_interpreter() -> None:
    code = (
        "import torch, llmkern; from llmkern.ops import hessian_update\n"
        "llmkern.use_backend('triton'); hessian_update(torch.zeros(4, 4), torch.ones(2, 4), 1.0)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode == 1
    assert "NotImplementedError" in result.stderr
    assert "tensors are on cpu" in result.stderr
