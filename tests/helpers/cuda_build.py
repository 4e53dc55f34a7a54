"""The CUDA sources compiled by nvcc for the two GPUs that the tests look at, once per change."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from compiled import PYTHON, ROOT, Compiled, compile_once, in_parallel, link

CSRC = ROOT / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
ARCHS = ("sm_80", "sm_90a")
FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", f"-I{CSRC}"]
DEPS = ["-MMD", "-MF", "{deps}"]


def job(source: Path) -> tuple[str, list[str | Path]]:
    """Arguments of `compile_once`; ptxas reports on each kernel. No include path but ours."""
    targets = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in ARCHS]
    command = [
        "nvcc",
        *FLAGS,
        *targets,
        "-Xptxas=-v",
        "--threads=2",
        *DEPS,
        "-c",
        source,
        "-o",
        "{out}",
    ]
    return f"cuda/{source.stem}.o", command


def compile_source(source: Path) -> Compiled:
    """One source for both architectures."""
    return compile_once(*job(source))


def build_module() -> Path:
    """The extension module _cuda of these objects."""
    import pybind11

    includes = [f"-I{path}" for path in (sysconfig.get_paths()["include"], pybind11.get_include())]
    names = f'-DLLMKERN_CUDA_ARCHS="{":".join(ARCHS)}"'
    source = CSRC / "cuda_module.cpp"
    host = ["nvcc", *FLAGS, *includes, names, *DEPS, "-c", source, "-o", "{out}"]
    objects = in_parallel([(f"cuda-{PYTHON}/module.o", host), *map(job, SOURCES)])
    return link(f"cuda-{PYTHON}/_cuda.so", ["nvcc", "-shared", "-cudart", "static"], objects)
