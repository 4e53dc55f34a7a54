"""What gets built and shipped: the wheel's contents, building without a compiler, the source archive."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Builds of a package write into the tree: one at a time, whichever worker they run on."""
    (ROOT / "build").mkdir(exist_ok=True)
    with FileLock(ROOT / "build" / "package.lock"):
        yield


def build_wheel(folder: Path, **env: str) -> tuple[set[str], str]:
    """Names in the wheel built from this tree, and what the build printed."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps"]
    result = subprocess.run(
        [*command, "-w", str(folder), str(ROOT)],
        env={**os.environ, "LLMKERN_BUILD_CUDA": "0", "LLMKERN_CPU_ISAS": "all", **env},
        capture_output=True,
        text=True,
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist()), output


AVX2 = "fma avx f16c avx2"
AVX512 = f"{AVX2} avx512f avx512dq avx512bw avx512vl"
BF16 = f"{AVX512} avx512vbmi avx512_vnni avx512_bf16"
CPUS = {
    "old": ("GenuineIntel", "sse4_2 avx", ["portable"]),
    "avx2": ("AuthenticAMD", AVX2, ["portable", "avx2"]),
    "avx512": ("GenuineIntel", AVX512, ["portable", "avx2", "avx512"]),
    "bf16": ("GenuineIntel", BF16, ["portable", "avx2", "avx512", "avx512bf16"]),
    "zen4": ("AuthenticAMD", BF16, ["portable", "avx2", "avx512", "avx512bf16", "zen4"]),
    "amx": (
        "GenuineIntel",
        f"{BF16} amx_bf16 amx_tile amx_int8",
        ["portable", "avx2", "avx512", "avx512bf16", "amx"],
    ),
}


@pytest.fixture
def isas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], list[str]]:
    """The instruction sets that setup.py compiles for LLMKERN_CPU_ISAS on a CPU of /proc/cpuinfo."""
    monkeypatch.setenv("LLMKERN_BUILD_CUDA", "0")
    with mock.patch("setuptools.setup"):
        select = runpy.run_path(str(ROOT / "setup.py"))["cpu_isas"]

    def chosen(choice: str, cpuinfo: str) -> list[str]:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
        monkeypatch.setitem(select.__globals__, "CPUINFO", tmp_path / "cpuinfo")
        monkeypatch.setenv("LLMKERN_CPU_ISAS", choice)
        with mock.patch("platform.machine", return_value="x86_64"):
            return list(select())

    return chosen


@pytest.mark.parametrize(("vendor", "flags", "expected"), CPUS.values(), ids=CPUS)
def test_native_sets_are_those_that_the_cpu_runs(
    vendor: str, flags: str, expected: list[str], isas: Callable[[str, str], list[str]]
) -> None:
    info = f"vendor_id\t: {vendor}\nflags\t\t: fpu {flags} ht\nvmx flags\t: vnmi\n"
    assert isas("native", info) == expected
    assert isas("all", info) == isas("native", "no such line") == isas("", info)
    assert len(isas("all", info)) == 6


def test_sets_can_be_listed_and_portable_is_always_there(
    isas: Callable[[str, str], list[str]],
) -> None:
    assert isas("amx;avx2", "") == ["portable", "avx2", "amx"]
    with pytest.raises(SystemExit, match="LLMKERN_CPU_ISAS: got 'avx3', expected all, native or"):
        isas("avx3", "")


@pytest.mark.slow
def test_wheel_holds_only_llmkern(tmp_path: Path) -> None:
    """All instruction sets, of which an in-place build for this machine may have left out some."""
    names, output = build_wheel(tmp_path)
    assert "Package would be ignored" not in output
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"llmkern"}
    assert "llmkern/triton_kernels/w4a16_gemm.py" in names
    assert "llmkern/assets/stdlib-llama/model.safetensors" in names
    assert "llmkern/py.typed" in names
    assert "llmkern/report/assets/report.html.j2" in names
    assert any(name.startswith("llmkern/_cpu.") for name in names)


@pytest.mark.slow
def test_without_a_compiler_the_package_still_builds_and_says_so_once(tmp_path: Path) -> None:
    names, output = build_wheel(tmp_path, PATH=str(tmp_path), CXX="")
    assert not any(name.startswith(("llmkern/_cpu.", "llmkern/_cuda.")) for name in names)
    assert "llmkern/__init__.py" in names
    assert output.count("no C++ compiler found") == 1


@pytest.mark.slow
def test_cuda_build_that_is_demanded_and_impossible_fails(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)],
        env={**os.environ, "LLMKERN_BUILD_CUDA": "1", "PATH": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert result.stderr.strip().endswith(
        "LLMKERN_BUILD_CUDA=1, but nvcc or a C++ compiler is not on PATH"
    )


@pytest.mark.slow
def test_source_archive_can_be_built_from(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {"csrc/llmkern.h", "csrc/cpu/kernels.h", "setup.py"} <= names
    assert "triton_kernels/w4a16_gemm.py" in names


@pytest.mark.slow
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
