"""What llmkern finds on this machine: versions, processors, and which backend serves which op."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmkern import _backends, ops
from llmkern._version import __version__
from llmkern.formats.int4 import QuantFormat

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "compressed-tensors",
    "safetensors",
    "accelerate",
    "datasets",
)


@dataclass(frozen=True)
class Serving:
    """Whether `backend` serves `op` on `device`; `reason` says why not, and is empty if it does."""

    op: str
    device: str
    backend: str
    reason: str


def versions() -> dict[str, str]:
    """Versions of llmkern, Python and the packages it works with; absent ones are named so."""
    found = {"llmkern": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def hardware() -> dict[str, str]:
    """Processors in use and what the compiled kernels were built for."""
    cpu, why_not_cpu = _backends.compiled_module("_cpu")
    cuda, why_not_cuda = _backends.compiled_module("_cuda")
    gpus = [
        f"{torch.cuda.get_device_name(i)} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))})"
        for i in range(torch.cuda.device_count())
    ]
    return {
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads in use",
        "cpu kernels": f"{cpu.isa()} (of {', '.join(cpu.isas())})" if cpu else str(why_not_cpu),
        "gpus": ", ".join(gpus) or "none",
        "cuda kernels": f"built for {', '.join(cuda.archs())}" if cuda else str(why_not_cuda),
        "forced backend": _backends.forced_backend() or "none",
    }


def serving() -> list[Serving]:
    """For each op and device here, which backends serve a small call of it and why others refuse."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows = []
    for op in ops.OPS:
        for device in devices:
            call = _example(op, device)
            rows += [Serving(op, device, name, _attempt(name, call)) for name in _backends.NAMES]
    return rows


def _attempt(backend: str, call: Callable[[], object]) -> str:
    with _backends.use_backend(backend):
        try:
            call()
        except NotImplementedError as refusal:
            return str(refusal).partition("(")[2].rpartition(")")[0] or str(refusal)
    return ""


def _example(op: str, device: str) -> Callable[[], object]:
    """A call of `op` on small random tensors of `device`."""
    N, K, group_size = 64, 128, 32
    x = torch.randn(4, K, device=device)
    scales = torch.rand(N, K // group_size, device=device)
    qweight = torch.randint(0, 1 << 20, (N, K // 8), dtype=torch.int32, device=device)
    meta = torch.full((N, K // 8), 0x44, dtype=torch.uint8, device=device)

    def hessian() -> Tensor:
        return torch.eye(K, device=device)

    calls: dict[str, Callable[[], object]] = {
        "dequantize_int4": lambda: ops.dequantize_int4(qweight, scales, group_size=group_size),
        "hessian_update": lambda: ops.hessian_update(hessian(), x, 1.0),
        "lut4_gemm": lambda: ops.lut4_gemm(
            x, qweight, torch.linspace(-1, 1, 16, device=device), scales, group_size=group_size
        ),
        "obs_prune": lambda: ops.obs_prune(x, hessian(), pattern=(2, 4)),
        "obs_quantize": lambda: ops.obs_quantize(x, hessian(), QuantFormat(4, group_size)),
        "sparse24_gemm": lambda: ops.sparse24_gemm(
            x, qweight.view(torch.float32).repeat(1, 4), meta
        ),
        "sparse24_w4a16_gemm": lambda: ops.sparse24_w4a16_gemm(
            x, qweight[:, : K // 16].contiguous(), meta, scales, group_size=group_size
        ),
        "w4a16_gemm": lambda: ops.w4a16_gemm(x, qweight, scales, group_size=group_size),
    }
    return calls[op]
