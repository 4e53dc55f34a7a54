"""Build rules: llmkern._cpu wherever there is a C++17 compiler, llmkern._cuda where there is nvcc.

The sources know nothing of torch, so building needs pybind11 and ninja only, and one wheel serves
every torch version. LLMKERN_BUILD_CUDA is auto (default: build it if nvcc is on PATH), 1 (fail if it
cannot be built) or 0; TORCH_CUDA_ARCH_LIST picks the GPU architectures. LLMKERN_CPU_ISAS is all
(default), native (those that this CPU runs) or a list such as portable;avx2.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CPU_SOURCES = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
CUDA_SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
HEADERS = sorted((ROOT / "csrc").rglob("*.h")) + sorted((ROOT / "csrc").rglob("*.cuh"))

# Every CPU source is compiled once per instruction set; cpu_module.cpp picks one at run time.
X86_ISAS = {
    "portable": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c",
    "avx512bf16": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c "
    "-mavx512vnni -mavx512vbmi -mavx512bf16",
}
# The same instructions, for CPUs where bfloat16 dot products run at full rate.
X86_ISAS["zen4"] = X86_ISAS["avx512bf16"]
X86_ISAS["amx"] = X86_ISAS["avx512bf16"] + " -mamx-tile -mamx-int8 -mamx-bf16"
CPUINFO = Path("/proc/cpuinfo")
CPU_FLAGS = "-O3 -std=c++17 -fPIC -fopenmp -fvisibility=hidden -fno-math-errno -Wall -Wextra"
CUDA_ARCHES = "8.0;8.6;8.9;9.0a+PTX"


def say(text: str) -> None:
    """Print a decision, once: pip also runs this file to ask for metadata, which builds nothing."""
    if not {"egg_info", "dist_info", "sdist", "--version"} & set(sys.argv):
        print(f"llmkern build: {text}", file=sys.stderr, flush=True)


def cuda_targets(arch_list: str) -> list[str]:
    """What TORCH_CUDA_ARCH_LIST asks for: "8.0;9.0a+PTX" is sm_80, sm_90a and compute_90."""
    targets = []
    for entry in arch_list.replace(" ", ";").split(";"):
        if not entry:
            continue
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not match:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: got {entry!r}, expected entries such as 8.0, 9.0a or 8.6+PTX"
            )
        major, minor, suffix, ptx = match.groups()
        targets.append(f"sm_{major}{minor}{suffix}")
        if ptx:
            # PTX of an architecture-specific target (90a) runs nowhere else: keep the generic one.
            targets.append(f"compute_{major}{minor}")
    return list(dict.fromkeys(targets))


def gencode_flags(targets: list[str]) -> str:
    """nvcc's flags that compile for `targets`."""
    virtual = {target: f"compute_{target.partition('_')[2]}" for target in targets}
    return " ".join(f"-gencode=arch={virtual[target]},code={target}" for target in targets)


class NinjaBuild(build_ext):
    """Compile each extension with one ninja file, in parallel."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        name = ext.name.rsplit(".", 1)[-1]
        # One folder for installs, editable installs and in-place builds, so that each finds the
        # other's objects; another one for each set of flags that the user adds.
        flags = os.environ.get("CXXFLAGS", "")
        tag = f"-{zlib.crc32(flags.encode()):08x}" if flags else ""
        build = f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}{tag}"
        temp = ROOT / "build" / build / name
        temp.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [ROOT / "csrc", sysconfig.get_paths()["include"], pybind11.get_include()]
        include_flags = " ".join(f"-I{shlex.quote(str(path))}" for path in includes)
        rules = cpu_rules if name == "_cpu" else cuda_rules
        lines = rules(temp, target, include_flags)
        (temp / "build.ninja").write_text("\n".join(lines) + "\n")
        subprocess.run([*ninja(), "-C", str(temp)], check=True)


def ninja() -> list[str]:
    """Command that runs ninja: the one on PATH, or the Python package's."""
    path = shutil.which("ninja")
    return [path] if path else [sys.executable, "-m", "ninja"]


def cxx() -> str | None:
    """The C++ compiler: $CXX, or the first that is there."""
    candidates = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    return next((c for c in candidates if c and shutil.which(c.split()[0])), None)


def native_isas() -> list[str]:
    """Those of X86_ISAS that this CPU runs, by Linux's list of what it can do; elsewhere all."""
    found = re.search(r"^flags\s*:(.*)$", CPUINFO.read_text(), re.M) if CPUINFO.exists() else None
    if found is None:
        return list(X86_ISAS)
    has = set(found[1].replace("_", "").split())  # avx512_bf16 is gcc's -mavx512bf16
    needs = {
        isa: set(re.findall(r"-m(\S+)", flags.replace("-mamx-", "-mamx")))
        for isa, flags in X86_ISAS.items()
    }
    amd = "AuthenticAMD" in CPUINFO.read_text()
    return [isa for isa in X86_ISAS if needs[isa] <= has and (amd or isa != "zen4")]


def cpu_isas() -> dict[str, str]:
    """The instruction sets that LLMKERN_CPU_ISAS asks for, with the compiler's flags of each."""
    known = X86_ISAS if platform.machine() in ("x86_64", "AMD64") else {"portable": ""}
    choice = os.environ.get("LLMKERN_CPU_ISAS") or "all"
    if choice == "all" or known is not X86_ISAS:
        return known
    names = native_isas() if choice == "native" else choice.split(";")
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(
            f"LLMKERN_CPU_ISAS: got {unknown[0]!r}, expected all, native or a list of {', '.join(known)}"
        )
    # Portable is what the kernels fall back to.
    return {isa: flags for isa, flags in known.items() if isa in ("portable", *names)}


def cpu_rules(temp: Path, target: Path, includes: str) -> list[str]:
    isas = cpu_isas()
    lines = [
        f"cxx = {cxx()}",
        f"flags = {CPU_FLAGS} {includes} {os.environ.get('CXXFLAGS', '')}",
        "rule compile",
        "  command = $cxx $flags $isa -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared -fopenmp $in -o $out {os.environ.get('LDFLAGS', '')}",
    ]
    # The table of sets is in the module: one object per choice, so that builds with others keep it.
    # It takes long: first, or it would be compiled alone at the end.
    objects = [f"cpu_module.{'-'.join(isas)}.o"]
    lines.append(f"build {objects[0]}: compile {ROOT / 'csrc' / 'cpu_module.cpp'}")
    lines.append(f"  isa = {' '.join(f'-DLLMKERN_HAS_{isa.upper()}' for isa in isas)}")
    for source in CPU_SOURCES:
        for isa, isa_flags in isas.items():
            objects.append(f"{source.stem}.{isa}.o")
            lines.append(f"build {objects[-1]}: compile {source}")
            lines.append(f"  isa = {isa_flags} -DLLMKERN_ISA={isa} -DLLMKERN_ISA_{isa.upper()}")
    lines.append(f"build {target}: link {' '.join(objects)}")
    return lines


def cuda_rules(temp: Path, target: Path, includes: str) -> list[str]:
    targets = cuda_targets(os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHES)
    names = f"'-DLLMKERN_CUDA_ARCHS=\"{':'.join(targets)}\"'"
    host = f"-ccbin {cxx()}" if os.environ.get("CXX") else ""
    lines = [
        f"nvcc = {shutil.which('nvcc')} {host}",
        f"flags = -O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden,-Wall {includes}",
        "rule compile",
        f"  command = $nvcc $flags {gencode_flags(targets)} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule host",
        f"  command = $nvcc $flags {names} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $nvcc -shared -cudart static $in -o $out",
    ]
    objects = []
    for source in CUDA_SOURCES:
        objects.append(f"{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
    objects.append("cuda_module.o")
    lines.append(f"build cuda_module.o: host {ROOT / 'csrc' / 'cuda_module.cpp'}")
    lines.append(f"build {target}: link {' '.join(objects)}")
    return lines


def extensions() -> list[Extension]:
    """The modules that can be built here; what cannot is said once, and why."""
    choice = os.environ.get("LLMKERN_BUILD_CUDA", "auto")
    if choice not in ("auto", "1", "0"):
        raise SystemExit(f"LLMKERN_BUILD_CUDA: got {choice!r}, expected auto, 1 or 0")
    depends = [str(path.relative_to(ROOT)) for path in HEADERS]
    modules = []
    if cxx():
        sources = ["csrc/cpu_module.cpp", *(str(p.relative_to(ROOT)) for p in CPU_SOURCES)]
        modules.append(Extension("llmkern._cpu", sources, depends=depends))
    else:
        say("no C++ compiler found: no CPU kernels; Triton and the torch reference remain")
    if choice == "0":
        say("CUDA kernels not built (LLMKERN_BUILD_CUDA=0)")
    elif shutil.which("nvcc") and cxx():
        sources = ["csrc/cuda_module.cpp", *(str(p.relative_to(ROOT)) for p in CUDA_SOURCES)]
        modules.append(Extension("llmkern._cuda", sources, depends=depends))
        say("CUDA kernels built (nvcc found)")
    elif choice == "1":
        raise SystemExit("LLMKERN_BUILD_CUDA=1, but nvcc or a C++ compiler is not on PATH")
    else:
        say("CUDA kernels not built (no nvcc on PATH)")
    return modules


setup(
    # The folder triton_kernels is installed inside the package: a top-level one of that name is
    # OpenAI's.
    packages=[*find_packages(include=["llmkern", "llmkern.*"]), "llmkern.triton_kernels"],
    package_dir={"llmkern.triton_kernels": "triton_kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": NinjaBuild},
)
