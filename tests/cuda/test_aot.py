"""nvcc compiles every CUDA source for the GPUs we build for, and no kernel spills registers."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
ARCHS = ("sm_80", "sm_90a")
USAGE = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<frame>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads",
    re.DOTALL,
)

pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on PATH")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """ptxas's report of each (source, architecture). No include path but ours: no torch header."""
    folder = tmp_path_factory.mktemp("cubin")

    def compile_one(job):
        source, arch = job
        cubin = folder / f"{source.stem}.{arch}.cubin"
        flags = ["-O3", "-std=c++17", "-cubin", f"-arch={arch}", "-Xptxas=-v", f"-I{CSRC}"]
        return subprocess.run(
            ["nvcc", *flags, str(source), "-o", str(cubin)], capture_output=True, text=True
        )

    jobs = [(source, arch) for source in SOURCES for arch in ARCHS]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(jobs, pool.map(compile_one, jobs), strict=True))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source, arch, compiled):
    result = compiled[source, arch]
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr
    kernels = [match.groupdict() for match in USAGE.finditer(result.stderr)]
    assert kernels, f"no kernel in {source.name}?\n{result.stderr}"
    for kernel in kernels:
        assert kernel["arch"] == arch
        # A stack frame is an array that did not fit into registers: as slow as a spill.
        used = {key: int(kernel[key]) for key in ("frame", "stores", "loads")}
        assert not any(used.values()), f"{kernel['kernel']}: {used}"
