"""The portable CPU kernels, compiled for aarch64 and run under qemu-user.

apt-get install g++-aarch64-linux-gnu qemu-user
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from compiled import in_parallel, link

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
# As setup.py's, less what only a shared library needs; O1 halves the time.
FLAGS = ["-O1", "-std=c++17", "-fopenmp", "-fno-math-errno", "-Wall", "-Wextra", "-Werror"]
PORTABLE = ["-DLLMKERN_ISA=portable", "-DLLMKERN_ISA_PORTABLE"]


def check_here(folder: str, compiler: str, run: list[str]) -> str:
    """Compile the kernels and the self-check, run it, and return what it printed."""
    sources = [*sorted((CSRC / "cpu").glob("*.cpp")), HERE / "self_check.cpp"]
    flags = [*FLAGS, *PORTABLE, f"-I{CSRC}", "-MMD", "-MF", "{deps}"]
    objects = in_parallel(
        [
            (f"{folder}/{source.stem}.o", [compiler, *flags, "-c", source, "-o", "{out}"])
            for source in sources
        ]
    )
    program = link(f"{folder}/self_check", [compiler, "-static", "-fopenmp"], objects)
    done = subprocess.run([*run, program], capture_output=True, text=True, timeout=300)
    failed = "\n".join(line for line in done.stdout.splitlines() if not line.startswith("ok"))
    assert done.returncode == 0, failed + done.stderr
    return done.stdout


@pytest.mark.slow
def test_portable_kernels_compute_the_same_on_aarch64():
    lacking = [tool for tool in (COMPILER, EMULATOR) if not shutil.which(tool)]
    if lacking:
        pytest.skip(f"not installed: {', '.join(lacking)}")
    printed = check_here("aarch64", COMPILER, [EMULATOR])
    for kernel in ("w4a16_gemm", "dequantize_int4", "lut4_gemm", "dequantize_lut4"):
        assert f"ok   {kernel} bfloat16 cpu" in printed
    for kernel in ("hessian_update", "hessian_factor", "obs_quantize", "obs_prune"):
        assert f"ok   {kernel}" in printed
