"""Builds the emulator (csrc/emu): the CUDA sources compiled for the host, rebuilt when they change."""

from __future__ import annotations

import ctypes
import mmap
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from compiled import PYTHON, cxx, in_parallel, link, load_extension

from llmkern import _backends

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EMULATOR = sorted((ROOT / "csrc" / "emu").glob("*.cpp"))
# Plain arithmetic must round once, as the sources say; the sanitizer's traps become errors of the
# launch: misaligned vector accesses, array indices, shifts, signed overflow.
FLAGS = (
    "-std=c++17 -O2 -fPIC -fvisibility=hidden -ffp-contract=off -fno-strict-aliasing -Wall -Wextra "
    "-Wno-unknown-pragmas -fsanitize=alignment,bounds,shift,signed-integer-overflow "
    "-fsanitize-undefined-trap-on-error -DLLMKERN_EMU -DLLMKERN_CUDA_MODULE=_emu"
)


def build(target: str, sources: list[Path]) -> Path:
    """Compile `sources` for the host into one shared library, `target`."""
    compiler = cxx()
    if compiler is None:
        pytest.skip("no C++ compiler")
    import pybind11

    folders = [ROOT / "csrc" / "emu", ROOT / "csrc"]
    folders += map(Path, (pybind11.get_include(), sysconfig.get_paths()["include"]))
    flags = [*FLAGS.split(), *(f"-I{folder}" for folder in folders), "-MMD", "-MF", "{deps}"]
    jobs = [
        (
            f"emu-{PYTHON}/{source.stem}.o",
            [compiler, *flags, "-x", "c++", "-c", source, "-o", "{out}"],
        )
        for source in sources
    ]
    return link(f"emu-{PYTHON}/{target}", [compiler, "-shared"], in_parallel(jobs))


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    """The probe kernels: small ones, right or broken on purpose, for tests of the emulator itself."""
    return ctypes.CDLL(str(build("probes.so", [*sorted(HERE.glob("probe_*.cu")), *EMULATOR])))


class Probe(ctypes.Structure):
    """As in probes.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("a", "b", "c", "out")] + [
        ("mode", ctypes.c_int)
    ]


@pytest.fixture
def probe(library: ctypes.CDLL) -> Callable[..., str]:
    """probe(entry, name, out, a, b, c, mode=0, reverse=False): runs a probe kernel; its error or ""."""

    def run(
        entry: str,
        name: str,
        out: torch.Tensor,
        *operands: torch.Tensor,
        mode: int = 0,
        reverse: bool = False,
    ) -> str:
        a, b, c = [*(t.data_ptr() for t in operands), None, None, None][:3]
        function = getattr(library, entry)
        function.restype = ctypes.c_char_p
        function.argtypes = [ctypes.c_char_p, ctypes.POINTER(Probe), ctypes.c_bool]
        arguments = Probe(a, b, c, out.data_ptr(), mode)
        return function(name.encode(), ctypes.byref(arguments), reverse).decode()

    return run


@pytest.fixture(scope="session")
def emulator_module() -> ModuleType:
    csrc = ROOT / "csrc"
    sources = sorted((csrc / "cuda").glob("*.cu"))
    path = build(
        "_emu.so", [*sources, *sorted((csrc / "emu").glob("*.cpp")), csrc / "cuda_module.cpp"]
    )
    return load_extension("_emu", path)


@pytest.fixture
def emulator(emulator_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Makes "cuda" the emulator: every op runs its CUDA backend, launch code included, on CPU tensors."""
    monkeypatch.setattr(_backends, "compiled_module", lambda name: (emulator_module, None))
    monkeypatch.setattr(_backends, "refuse_cuda", lambda device: None)
    monkeypatch.setattr(_backends, "cuda_queue", lambda device: (0, 0))
    monkeypatch.setattr(_backends, "cuda_capability", lambda device: 90)
    with _backends.use_backend("cuda"):
        yield emulator_module
    emulator_module.set_reverse_order(False)


@pytest.fixture
def both_orders(emulator: ModuleType) -> Callable[[Callable[[], object]], object]:
    """Runs a call with threads and blocks in both orders; races show as different bits."""

    def run(call: Callable[[], object]) -> object:
        results = []
        for reverse in (False, True):
            emulator.set_reverse_order(reverse)
            results.append(call())
        forward, backward = (r if isinstance(r, tuple) else (r,) for r in results)
        for a, b in zip(forward, backward, strict=True):
            assert a is b or torch.equal(a, b), "the result depends on the order of the threads"
        return results[0]

    return run


@pytest.fixture
def guarded() -> Callable[[torch.Tensor | None], torch.Tensor | None]:
    """Copies a tensor to where the page behind its last element cannot be touched.

    A kernel that reads or writes past the end then fails with "illegal memory access". The copy is
    16-byte aligned, so up to 15 bytes of NaN may follow it.
    """
    page = mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)

    def copy(t: torch.Tensor | None) -> torch.Tensor | None:
        if t is None:
            return None
        size = -(-t.numel() * t.element_size() // 16) * 16
        pages = -(-size // page) * page
        memory = mmap.mmap(-1, pages + page)
        memory[:pages] = b"\xff" * pages
        base = torch.frombuffer(memory, dtype=torch.uint8)
        assert libc.mprotect(ctypes.c_void_p(base.data_ptr() + pages), page, 0) == 0  # PROT_NONE
        start = pages - size
        flat = base[start : start + t.numel() * t.element_size()].view(t.dtype)
        return flat.view(t.shape).copy_(t)

    return copy
