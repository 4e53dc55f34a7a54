"""nvcc compiles every CUDA source for the GPUs we build for, and no kernel spills registers.

Likewise the emulator's probe kernels, which between them use every instruction of ptx.cuh.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from compiled import compile_once, load_extension
from cuda_build import ARCHS, CSRC, SOURCES, build_module, compile_source

PROBES = [
    Path(__file__).parents[1] / "emu" / f"probe_{name}.cu" for name in ("tensor_core", "async_copy")
]
USAGE = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<frame>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads",
    re.DOTALL,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on PATH"),
]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source, arch):
    report = compile_source(source).report
    assert "warning" not in report, report
    kernels = [match.groupdict() for match in USAGE.finditer(report)]
    mine = [kernel for kernel in kernels if kernel["arch"] == arch]
    assert mine, f"no kernel in {source.name}?\n{report}"
    assert {kernel["arch"] for kernel in kernels} == set(ARCHS)
    for kernel in mine:
        # A stack frame is an array that did not fit into registers: as slow as a spill.
        used = {key: int(kernel[key]) for key in ("frame", "stores", "loads")}
        assert not any(used.values()), f"{kernel['kernel']}: {used}"


def test_the_module_names_its_architectures_without_a_driver():
    """In place, a machine without a GPU builds no CUDA: here the module is linked and loaded."""
    assert tuple(load_extension("_cuda", build_module()).archs()) == ARCHS


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
def test_every_instruction_of_ptx_cuh_assembles(arch):
    """ptxas takes the PTX that nvcc makes. Nothing runs it."""
    expected = INSTRUCTIONS | INSTRUCTIONS_SM90
    assert set(WRAPPER.findall((CSRC / "cuda/common/ptx.cuh").read_text())) == set(expected)
    ptx = ""
    for probe in PROBES:
        name, target = f"cuda/{probe.stem}.{arch}", f"-arch={arch}"
        flags = ["-O3", "-std=c++17", target, f"-I{CSRC}", "-MMD", "-MF", "{deps}"]
        made = compile_once(f"{name}.ptx", ["nvcc", "-ptx", *flags, probe, "-o", "{out}"])
        assemble = ["nvcc", "-cubin", target, made.path, "-o", "{out}"]
        assembled = compile_once(f"{name}.cubin", assemble, [made.path])
        assert "warning" not in made.report + assembled.report, made.report + assembled.report
        ptx += made.path.read_text()
    present = {name for name, instruction in expected.items() if instruction in ptx}
    assert present == set(expected if arch == "sm_90a" else INSTRUCTIONS)
    assert ("trap;" in ptx) == (arch == "sm_80"), "what needs sm_90 traps below it"
