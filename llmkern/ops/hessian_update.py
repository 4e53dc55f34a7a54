"""hessian_update: H += alpha * xᵀx, lower triangle, float32 accumulation; one H, or one per expert.

With alpha = 2/n, n the number of rows seen over the whole calibration set, H becomes the Hessian of
the layer's squared output error, 2/n XᵀX (GPTQ, arXiv 2210.17323). alpha multiplies the finished sums
and never x, so bfloat16 and float16 products enter exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern import _backends
from llmkern._backends import Backend
from llmkern._dtypes import FLOAT_NAMES, FLOATS
from llmkern.ops._library import expect, kernels, pointer, register
from llmkern.reference.hessian_update import experts
from llmkern.reference.hessian_update import hessian_update as _reference

SCHEMA = "hessian_update(Tensor(a!) H, Tensor x, float alpha, Tensor? offsets=None) -> ()"


def _launch_reference(H: Tensor, x: Tensor, alpha: float, offsets: Tensor | None) -> None:
    _reference(H, x, alpha, offsets)


def _refuse_cuda(H: Tensor, *args: object) -> str | None:
    return _backends.refuse_cuda(H.device)


def _launch_cuda(H: Tensor, x: Tensor, alpha: float, offsets: Tensor | None) -> None:
    device, stream = _backends.cuda_queue(x.device)
    kernels("_cuda").hessian_update(
        H=pointer(H),
        x=pointer(x),
        T=x.shape[-2],
        K=x.shape[-1],
        alpha=alpha,
        dtype=FLOAT_NAMES[x.dtype],
        E=len(H) if H.dim() == 3 else 1,
        offsets=pointer(offsets),
        device=device,
        stream=stream,
    )


def _refuse_triton(H: Tensor, *args: object) -> str | None:
    return _backends.refuse_triton(H.device)


def _launch_triton(H: Tensor, x: Tensor, alpha: float, offsets: Tensor | None) -> None:
    from llmkern.triton_kernels.hessian_update import launch

    launch(H, x, alpha, offsets)


def _refuse_cpu(H: Tensor, *args: object) -> str | None:
    return _backends.refuse_cpu(H.device.type)


def _launch_cpu(H: Tensor, x: Tensor, alpha: float, offsets: Tensor | None) -> None:
    for part, rows in experts(H, x, offsets):
        if len(rows):
            kernels("_cpu").hessian_update(
                H=pointer(part),
                x=pointer(rows),
                T=rows.shape[0],
                K=rows.shape[1],
                alpha=alpha,
                dtype=FLOAT_NAMES[x.dtype],
                E=1,
                offsets=0,
            )


BACKENDS = (
    Backend("cuda", _refuse_cuda, _launch_cuda),
    Backend("triton", _refuse_triton, _launch_triton),
    Backend("cpu", _refuse_cpu, _launch_cpu),
    Backend("reference", _backends.never_refuse, _launch_reference),
)


def _check(H: Tensor, x: Tensor, alpha: float, offsets: Tensor | None) -> None:
    op = "hessian_update"
    batched = H.dim() == 3
    rank = 3 if batched and offsets is None else 2
    wanted = "[E, T, K]" if rank == 3 else "[T, K]"
    expect(
        x.dim() == rank and x.dtype in FLOATS,
        op,
        "x",
        x,
        f"float32, bfloat16 or float16 {wanted}",
    )
    K = x.shape[-1]
    E = len(x) if rank == 3 else len(H) if batched else 1
    shape = (E, K, K) if batched else (K, K)
    expect(
        H.dtype == torch.float32 and tuple(H.shape) == shape and H.is_contiguous(),
        op,
        "H",
        H,
        f"a contiguous float32 {list(shape)}",
    )
    expect(x.device == H.device, op, "x", x, f"the device of H, {H.device}")
    if offsets is None:
        return
    expect(
        batched and tuple(offsets.shape) == (E + 1,) and offsets.dtype == torch.int64,
        op,
        "offsets",
        offsets,
        "int64 [E + 1] for H [E, K, K]",
    )
    expect(offsets.device == H.device, op, "offsets", offsets, f"the device of H, {H.device}")


def _check_offsets(offsets: Tensor | None, T: int) -> None:
    """What offsets hold; on the CPU only, because looking at a GPU tensor would stall its queue."""
    if offsets is None or offsets.device.type != "cpu":
        return
    if int(offsets[0]) < 0 or int(offsets[-1]) > T or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"hessian_update: offsets: got {offsets.tolist()}, expected them to ascend in 0 to {T}"
        )


def _fake(H: Tensor, x: Tensor, alpha: float, offsets: Tensor | None = None) -> None:
    _check(H, x, alpha, offsets)


def _run(H: Tensor, x: Tensor, alpha: float, offsets: Tensor | None = None) -> None:
    _check(H, x, alpha, offsets)
    _check_offsets(offsets, x.shape[-2])
    if x.numel() == 0 or H.numel() == 0:
        return
    x = x.contiguous()
    offsets = None if offsets is None else offsets.contiguous()
    args = (H, x, alpha, offsets)
    _backends.choose("hessian_update", BACKENDS, *args).launch(*args)


_op = register(SCHEMA, _run, _fake)


def hessian_update(H: Tensor, x: Tensor, alpha: float, offsets: Tensor | None = None) -> None:
    """Add alpha * xᵀx to the lower triangle of H, in place; the strict upper triangle is left alone.

    Args:
        H: float32 [K, K], contiguous; or [E, K, K], one per expert, updated in one launch.
        x: float32, bfloat16 or float16 [..., K]: the layer's inputs, any leading shape; for experts
            [E, ..., K], or [T, K] with `offsets`.
        alpha: 2/n for the GPTQ Hessian, n = rows of x over all calls.
        offsets: int64 [E + 1], ascending from 0 to T: expert e has the rows offsets[e] to
            offsets[e + 1] - 1 of x. On a GPU what they hold is not looked at; rows outside x are then
            left out.

    Raises:
        ValueError: an argument's dtype, shape or device is not as above.
        NotImplementedError: a backend was forced that cannot serve the call.
    """
    leading = (x.shape[0],) if H.dim() == 3 and offsets is None and x.dim() > 1 else ()
    _op(H, x.reshape(*leading, -1, x.shape[-1]), alpha, offsets)
