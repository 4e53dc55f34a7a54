"""hessian_update: H += alpha * xᵀx, lower triangle, float32 accumulation.

With alpha = 2/n, n the number of rows seen over the whole calibration set, H becomes the Hessian of
the layer's squared output error, 2/n XᵀX (GPTQ, arXiv 2210.17323). alpha multiplies the finished sums
and never x, so bfloat16 and float16 products enter exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern import _backends
from llmkern._backends import Backend
from llmkern.ops._library import DTYPE_CODES, FLOATS, expect, pointer, register
from llmkern.reference.hessian_update import hessian_update as _reference

SCHEMA = "hessian_update(Tensor(a!) H, Tensor x, float alpha) -> ()"


def _launch_reference(H: Tensor, x: Tensor, alpha: float) -> None:
    _reference(H, x, alpha)


def _refuse_cuda(H: Tensor, x: Tensor, alpha: float) -> str | None:
    return _backends.refuse_cuda(x.device)


def _launch_cuda(H: Tensor, x: Tensor, alpha: float) -> None:
    module, _ = _backends.compiled_module("_cuda")
    assert module is not None
    queue = _backends.cuda_queue(x.device)
    module.hessian_update(pointer(H), pointer(x), *x.shape, alpha, DTYPE_CODES[x.dtype], *queue)


def _refuse_triton(H: Tensor, x: Tensor, alpha: float) -> str | None:
    return _backends.refuse_triton(H.device)


def _launch_triton(H: Tensor, x: Tensor, alpha: float) -> None:
    from llmkern.triton_kernels.hessian_update import launch

    launch(H, x, alpha)


def _refuse_cpu(H: Tensor, x: Tensor, alpha: float) -> str | None:
    return _backends.refuse_cpu(H.device.type)


def _launch_cpu(H: Tensor, x: Tensor, alpha: float) -> None:
    module, _ = _backends.compiled_module("_cpu")
    assert module is not None
    module.hessian_update(pointer(H), pointer(x), *x.shape, alpha, DTYPE_CODES[x.dtype])


BACKENDS = (
    Backend("cuda", _refuse_cuda, _launch_cuda),
    Backend("triton", _refuse_triton, _launch_triton),
    Backend("cpu", _refuse_cpu, _launch_cpu),
    Backend("reference", _backends.never_refuse, _launch_reference),
)


def _check(H: Tensor, x: Tensor, alpha: float) -> None:
    op = "hessian_update"
    expect(x.dim() == 2 and x.dtype in FLOATS, op, "x", x, "float32, bfloat16 or float16 [T, K]")
    K = x.shape[1]
    expect(
        H.dtype == torch.float32 and tuple(H.shape) == (K, K) and H.is_contiguous(),
        op,
        "H",
        H,
        f"a contiguous float32 [{K}, {K}]",
    )
    expect(x.device == H.device, op, "x", x, f"the device of H, {H.device}")


def _fake(H: Tensor, x: Tensor, alpha: float) -> None:
    _check(H, x, alpha)


def _run(H: Tensor, x: Tensor, alpha: float) -> None:
    _check(H, x, alpha)
    if x.numel() == 0:
        return
    x = x.contiguous()
    _backends.choose("hessian_update", BACKENDS, H, x, alpha).launch(H, x, alpha)


_op = register(SCHEMA, _run, _fake)


def hessian_update(H: Tensor, x: Tensor, alpha: float) -> None:
    """Add alpha * xᵀx to the lower triangle of H, in place; the strict upper triangle is left alone.

    Args:
        H: float32 [K, K], contiguous.
        x: float32, bfloat16 or float16 [..., K]: the layer's inputs, any leading shape.
        alpha: 2/n for the GPTQ Hessian, n = rows of x over all calls.

    Raises:
        ValueError: an argument's dtype, shape or device is not as above.
        NotImplementedError: a backend was forced that cannot serve the call.
    """
    _op(H, x.reshape(-1, x.shape[-1]), alpha)
