"""nvcc compiles every CUDA source for the GPUs we build for, and no kernel spills registers.

Likewise the emulator's probe kernels, which between them use every instruction of ptx.cuh.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CSRC = TESTS.parent / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
PROBES = [TESTS / "emu" / f"probe_{name}.cu" for name in ("tensor_core", "async_copy")]
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


WRAPPER = re.compile(r"^__device__ __forceinline__ \w+ (?!shared_address)(\w+)\(", re.MULTILINE)
# What each function of ptx.cuh must leave in the PTX: of both architectures, or of sm_90a alone.
INSTRUCTIONS = {
    "ldmatrix_x2": "ldmatrix.sync.aligned.m8n8.x2.shared",
    "ldmatrix_x4": "ldmatrix.sync.aligned.m8n8.x4.shared",
    "ldmatrix_x2_trans": "ldmatrix.sync.aligned.m8n8.x2.trans.shared",
    "ldmatrix_x4_trans": "ldmatrix.sync.aligned.m8n8.x4.trans.shared",
    "mma_m16n8k16": "mma.sync.aligned.m16n8k16",
    "mma_sp_m16n8k32": "mma.sp::ordered_metadata.sync.aligned.m16n8k32",
    "cp_async_16": "cp.async.cg.shared.global",
    "cp_async_commit": "cp.async.commit_group",
    "cp_async_wait": "cp.async.wait_group",
}
INSTRUCTIONS_SM90 = {
    "mbarrier_init": "mbarrier.init",
    "mbarrier_init_fence": "fence.mbarrier_init",
    "mbarrier_arrive": "mbarrier.arrive.shared",
    "mbarrier_arrive_expect_tx": "mbarrier.arrive.expect_tx",
    "mbarrier_wait": "mbarrier.try_wait.parity",
    "bulk_copy": "cp.async.bulk.shared",
    "cluster_rank": "%cluster_ctarank",
    "cluster_size": "%cluster_nctarank",
    "cluster_sync": "barrier.cluster.wait",
    "cluster_load": "ld.shared::cluster",
    "grid_dependency_wait": "griddepcontrol.wait",
    "grid_launch_dependents": "griddepcontrol.launch_dependents",
}


@pytest.mark.parametrize("arch", ARCHS)
def test_every_instruction_of_ptx_cuh_assembles(arch, tmp_path):
    """`-cubin` has ptxas take the PTX, which `-keep` leaves behind. Nothing runs it."""
    expected = INSTRUCTIONS | INSTRUCTIONS_SM90
    assert set(WRAPPER.findall((CSRC / "cuda/common/ptx.cuh").read_text())) == set(expected)
    ptx = ""
    for probe in PROBES:
        flags = [
            "-O3",
            "-std=c++17",
            f"-arch={arch}",
            "-keep",
            f"-keep-dir={tmp_path}",
            f"-I{CSRC}",
        ]
        command = [
            "nvcc",
            "-cubin",
            *flags,
            str(probe),
            "-o",
            str(tmp_path / f"{probe.stem}.cubin"),
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "warning" not in result.stderr, result.stderr
        ptx += (tmp_path / f"{probe.stem}.ptx").read_text()
    present = {name for name, instruction in expected.items() if instruction in ptx}
    assert present == set(expected if arch == "sm_90a" else INSTRUCTIONS)
    assert ("trap;" in ptx) == (arch == "sm_80"), "what needs sm_90 traps below it"
