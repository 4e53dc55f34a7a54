"""Which implementation of an op runs: a list of backends per op, chosen per call, in one place.

A backend is data: a name, a pure function that says why it cannot serve a call (or None), and a
launch function that fills caller-allocated outputs. The first backend of an op's list that does not
refuse is used. `use_backend` or the environment variable LLMKERN_BACKEND forces one by name; a
forced backend that refuses is an error, because nothing falls back silently.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NAMES = ("cuda", "triton", "cpu", "reference")

_log = logging.getLogger("llmkern")
_forced: ContextVar[str | None] = ContextVar("llmkern_backend", default=None)


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        name: one of `NAMES`.
        refuse: called with the op's own arguments; returns why it cannot serve them, or None.
        launch: called with the op's own arguments plus the allocated outputs; writes the outputs.
    """

    name: str
    refuse: Callable[..., str | None]
    launch: Callable[..., None]


class use_backend:
    """Force every op onto one backend, at once; as a context manager, until the block ends.

    Args:
        name: "cuda", "triton", "cpu" or "reference"; None returns to the automatic choice.

    Raises:
        ValueError: unknown name.
    """

    def __init__(self, name: str | None) -> None:
        _validate_name(name, "name")
        self._token = _forced.set(name)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        _forced.reset(self._token)


def _validate_name(name: str | None, source: str) -> None:
    if name is not None and name not in NAMES:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(NAMES)}")


def forced_backend() -> str | None:
    """Name of the backend that `use_backend` or LLMKERN_BACKEND asks for, or None."""
    name = _forced.get()
    if name is None:
        name = os.environ.get("LLMKERN_BACKEND") or None
        _validate_name(name, "LLMKERN_BACKEND")
    return name


def choose(op: str, backends: Sequence[Backend], *args: Any) -> Backend:
    """First backend of `backends` that serves `args`; the forced one if there is one.

    Raises:
        NotImplementedError: no backend serves the call, or the forced one refuses it; the message
            lists the reasons.
    """
    name = forced_backend()
    reasons = []
    for backend in backends:
        if name is not None and backend.name != name:
            continue
        reason = backend.refuse(*args)
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    wanted = f"the {name} backend" if name else "any backend"
    why = "; ".join(reasons) or f"{op} has no {name} implementation"
    raise NotImplementedError(f"{op}: {wanted} cannot serve this call ({why})")


@cache
def compiled_module(name: str) -> tuple[ModuleType | None, str | None]:
    """The extension module llmkern.<name>, tried once: (module, None) or (None, why not)."""
    # The compiled kernels share the OpenMP runtime that torch brings, so torch must be loaded first.
    import torch  # noqa: F401

    try:
        return importlib.import_module(f"llmkern.{name}"), None
    except ImportError as error:
        why = str(error)
        if name == "_cuda" and isinstance(error, ModuleNotFoundError):
            why = "not built: there was no nvcc, under make no GPU, or LLMKERN_BUILD_CUDA=0"
        reason = f"llmkern.{name} is not available ({why})"
        if name == "_cpu":
            _log.warning("%s: CPU tensors are served by the slow torch reference", reason)
        return None, reason


def refuse_cpu(device_type: str) -> str | None:
    """Why the compiled CPU kernels cannot serve a tensor on `device_type`, or None."""
    if device_type != "cpu":
        return f"tensors are on {device_type}"
    return compiled_module("_cpu")[1]


def refuse_cuda(device: torch.device) -> str | None:
    """Why the compiled CUDA kernels cannot serve a tensor on `device`, or None."""
    if device.type != "cuda":
        return f"tensors are on {device.type}"
    return _refuse_cuda_device(device.index)


@cache
def _refuse_cuda_device(index: int) -> str | None:
    import torch

    module, reason = compiled_module("_cuda")
    if module is None:
        return reason
    return refuse_capability(torch.cuda.get_device_capability(index), module.archs())


def refuse_capability(capability: tuple[int, int], archs: Sequence[str]) -> str | None:
    """Why code built for `archs` cannot run on a GPU of `capability`, or None.

    Machine code (sm_XY) runs on its own major version from minor version Y on; that of an
    architecture-specific target (sm_90a) on exactly its own version. PTX (compute_XY) runs on XY and
    everything newer.
    """
    major, minor = capability
    here = f"the GPU's compute capability is {major}.{minor}"
    if capability < (8, 0):
        return f"{here}, expected 8.0 or newer"
    for arch in archs:
        kind, _, name = arch.partition("_")
        version = divmod(int(name.rstrip("af")), 10)
        if name[-1] in "af":
            serves = version == capability
        elif kind == "compute":
            serves = version <= capability
        else:
            serves = version[0] == major and version[1] <= minor
        if serves:
            return None
    return f"{here}, but llmkern._cuda was built for {', '.join(archs) or 'no GPU'}"


def cuda_queue(device: torch.device) -> tuple[int, int]:
    """Ordinal and current stream of a CUDA device, as the compiled kernels take them."""
    import torch

    return device.index, torch.cuda.current_stream(device).cuda_stream


def cuda_capability(device: torch.device) -> int:
    """Compute capability of a CUDA device as one number, 90 for 9.0."""
    return _cuda_capability(device.index)


@cache
def _cuda_capability(index: int) -> int:
    import torch

    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@cache
def _triton_missing() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return None


def triton_interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refuse_triton(device: torch.device) -> str | None:
    """Why the Triton kernels cannot serve a tensor on `device`, or None.

    Triton serves CUDA tensors. Its interpreter also serves CPU tensors, far too slowly for use, so
    it is taken only where a test or a user asks for the triton backend by name.
    """
    if device.type == "cuda":
        return _triton_missing() or _refuse_triton_device(device.index)
    if device.type == "cpu" and triton_interpreted() and forced_backend() == "triton":
        return _triton_missing()
    return f"tensors are on {device.type}"


@cache
def _refuse_triton_device(index: int) -> str | None:
    import torch

    # Triton compiles for the GPU at hand, and its PTX runs on whatever is newer than 8.0.
    return refuse_capability(torch.cuda.get_device_capability(index), ("compute_80",))


def never_refuse(*args: Any) -> None:
    """`refuse` of the reference backend, which serves everything."""
