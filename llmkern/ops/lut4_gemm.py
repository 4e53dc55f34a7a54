"""lut4_gemm: y = x @ w.T + bias with w = scales * codebook[codes], any book of 16 values.

NF4 as in QLoRA (arXiv 2305.14314), FP4, or a learned table per row as in SqueezeLLM (arXiv 2306.07629).
As with integer codes, a small M is bound by reading the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern import _backends
from llmkern._backends import Backend
from llmkern.ops._int4_weight import refuse_cuda_weight, refuse_triton_weight
from llmkern.ops._library import (
    DTYPE_CODES,
    FLOATS,
    LAYOUT_CODES,
    LIBRARY,
    expect,
    pointer,
    register,
)
from llmkern.ops._lut4_weight import canonical_qweight, check_weight, weight_shape
from llmkern.ops.dequantize_lut4 import dequantize_lut4
from llmkern.reference.lut4_gemm import lut4_gemm as _reference

SCHEMA = (
    "lut4_gemm(Tensor x, Tensor qweight, Tensor codebook, Tensor? scales, Tensor? bias, "
    "int group_size, str layout) -> Tensor"
)

CUDA_GEMV_ROWS = 8  # up to here the CUDA kernel reads x at any address


def _refuse_cpu(x: Tensor, *_: Any) -> str | None:
    return _backends.refuse_cpu(x.device.type)


def _launch_cpu(
    x: Tensor,
    qweight: Tensor,
    codebook: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    layout: str,
    out: Tensor,
) -> None:
    kernels: Any = _backends.compiled_module("_cpu")[0]
    kernels.lut4_gemm(
        x.data_ptr(),
        qweight.data_ptr(),
        codebook.data_ptr(),
        pointer(scales),
        pointer(bias),
        out.data_ptr(),
        *out.shape,
        x.shape[1],
        x.stride(0),
        group_size,
        codebook.dim() - 1,
        DTYPE_CODES[x.dtype],
        0 if scales is None else DTYPE_CODES[scales.dtype],
        LAYOUT_CODES[layout],
    )


def _launch_reference(
    x: Tensor,
    qweight: Tensor,
    codebook: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    layout: str,
    out: Tensor,
) -> None:
    qweight = canonical_qweight(qweight, layout)
    out.copy_(_reference(x, qweight, codebook, scales, bias, group_size))


def _refuse_cuda(
    x: Tensor,
    qweight: Tensor,
    codebook: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    layout: str,
    out: Tensor,
) -> str | None:
    return refuse_cuda_weight(qweight, layout)


def _launch_cuda(
    x: Tensor,
    qweight: Tensor,
    codebook: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    layout: str,
    out: Tensor,
) -> None:
    many = x.shape[0] > CUDA_GEMV_ROWS and x.dtype != torch.float32
    if many and (x.data_ptr() % 16 or x.stride(0) % 8):
        x = x.clone(memory_format=torch.contiguous_format)  # is copied in 16-byte pieces
    kernels: Any = _backends.compiled_module("_cuda")[0]
    kernels.lut4_gemm(
        x.data_ptr(),
        qweight.data_ptr(),
        codebook.data_ptr(),
        pointer(scales),
        pointer(bias),
        out.data_ptr(),
        *out.shape,
        x.shape[1],
        x.stride(0),
        group_size,
        codebook.dim() - 1,
        DTYPE_CODES[x.dtype],
        0 if scales is None else DTYPE_CODES[scales.dtype],
        LAYOUT_CODES[layout],
        *_backends.cuda_queue(x.device),
    )


def _refuse_triton(
    x: Tensor,
    qweight: Tensor,
    codebook: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    layout: str,
    out: Tensor,
) -> str | None:
    return refuse_triton_weight(qweight, layout)


def _launch_triton(*args: Any) -> None:
    from llmkern.triton_kernels.lut4_gemm import launch

    launch(*args)


BACKENDS = (
    Backend("cuda", _refuse_cuda, _launch_cuda),
    Backend("triton", _refuse_triton, _launch_triton),
    Backend("cpu", _refuse_cpu, _launch_cpu),
    Backend("reference", _backends.never_refuse, _launch_reference),
)


def _check(
    x: Tensor,
    qweight: Tensor,
    codebook: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    layout: str,
) -> None:
    op = "lut4_gemm"
    check_weight(op, qweight, codebook, scales, group_size, layout)
    N, K = weight_shape(qweight, layout)
    if x.dim() != 2 or x.shape[1] != K or x.dtype not in FLOATS:
        expect(False, op, "x", x, f"float32, bfloat16 or float16 [M, {K}]")
    if x.device != qweight.device:
        expect(False, op, "x", x, f"the device of qweight, {qweight.device}")
    if bias is None:
        return
    if bias.shape != (N,) or bias.dtype != x.dtype or bias.device != x.device:
        wanted = f"{str(x.dtype).removeprefix('torch.')} [{N}] on {x.device}"
        expect(False, op, "bias", bias, wanted)


def _fake(
    x: Tensor,
    qweight: Tensor,
    codebook: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    layout: str,
) -> Tensor:
    _check(x, qweight, codebook, scales, bias, group_size, layout)
    return x.new_empty(x.shape[0], weight_shape(qweight, layout)[0])


def _run(
    x: Tensor,
    qweight: Tensor,
    codebook: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    layout: str,
) -> Tensor:
    out = _fake(x, qweight, codebook, scales, bias, group_size, layout)
    if out.numel() == 0:
        return out
    # Kernels read rows of x at any distance, but each row and the bias contiguously.
    if x.stride(1) != 1 and x.shape[1] != 1:
        x = x.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    args = (x, qweight, codebook, scales, bias, group_size, layout)
    _backends.choose("lut4_gemm", BACKENDS, *args, out).launch(*args, out)
    return out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, qweight, codebook, scales, _, ctx.group_size, ctx.layout = inputs
    ctx.save_for_backward(qweight, codebook, scales)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    qweight, codebook, scales = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        w = dequantize_lut4(
            qweight,
            codebook,
            scales,
            group_size=ctx.group_size,
            dtype=grad.dtype,
            layout=ctx.layout,
        )
        grad_x = grad @ w
    if ctx.needs_input_grad[4]:
        grad_bias = grad.sum(0)
    return grad_x, None, None, None, grad_bias, None, None


_op = register(SCHEMA, _run, _fake)
torch.library.register_autograd(
    "llmkern::lut4_gemm", _backward, setup_context=_setup_context, lib=LIBRARY
)


def lut4_gemm(
    x: Tensor,
    qweight: Tensor,
    codebook: Tensor,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_size: int,
    layout: str = "canonical",
) -> Tensor:
    """Product with a weight of codes into a book: y = x @ wᵀ + bias, w = scales * codebook[codes].

    Differentiable in x and bias (the backward pass dequantizes the weight), so adapters can be
    trained on top of it (QLoRA).

    On the CUDA kernels more than 8 rows of 16-bit x are multiplied with the book's entries rounded to
    x's dtype, which must be able to hold them; up to 8 rows, and for float32 x, nothing is rounded.

    The CPU kernels round nothing either, except for bfloat16 x on AMX from eight rows on and on AMD's
    CPUs with bfloat16 dot products (zen4): there w is rounded to bfloat16 once, as dequantizing does.

    Args:
        x: float32, bfloat16 or float16 [..., K], any leading shape.
        qweight: int32 [N, K/8], the canonical layout of `llmkern.formats.lut4`, or a backend's
            repacked one as named by `layout`.
        codebook: float32 [16] (one book), [N, 16] (one per row) or [N, K/group_size, 16] (one per
            group).
        scales: float32, bfloat16 or float16 [N, K/group_size], or None for the constant 1.
        bias: [N] in x's dtype, or None.
        group_size: K-elements per scale, a multiple of 32 that divides K.
        layout: "canonical" or "cpu".

    Returns:
        y [..., N] in x's dtype, accumulated in float32.

    Raises:
        ValueError: an argument's dtype, shape, device or layout is not as above.
        NotImplementedError: a backend was forced that cannot serve the call.
    """
    if x.dim() == 2:
        y: Tensor = _op(x, qweight, codebook, scales, bias, group_size, layout)
        return y
    y = _op(x.reshape(-1, x.shape[-1]), qweight, codebook, scales, bias, group_size, layout)
    return y.view(*x.shape[:-1], y.shape[-1])
