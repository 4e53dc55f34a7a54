"""sparse24_w4a16_gemm: y = x @ w.T + bias with 4-bit codes inside 2:4 sparsity, 3 bits a weight.

The format of Sparse-Marlin (arXiv 2408.11743, section 5), with a mask that is no function of the codes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern import _backends
from llmkern._backends import Backend
from llmkern.ops import _sparse24_cuda
from llmkern.ops._int4_weight import refuse_triton_weight
from llmkern.ops._library import (
    DTYPE_CODES,
    FLOATS,
    LAYOUT_CODES,
    LIBRARY,
    expect,
    pointer,
    register,
)
from llmkern.ops._sparse24_weight import (
    canonical_int4_weight,
    check_int4_weight,
    int4_weight_shape,
    refuse_cuda_layout,
)
from llmkern.ops.dequantize_sparse24 import dequantize_sparse24
from llmkern.reference.sparse24_w4a16_gemm import sparse24_w4a16_gemm as _reference

SCHEMA = (
    "sparse24_w4a16_gemm(Tensor x, Tensor qvalues, Tensor meta, Tensor scales, Tensor? zeros, "
    "Tensor? bias, int group_size, str layout) -> Tensor"
)


def _refuse_cpu(*args: Any) -> str | None:
    x, *_, layout, _out = args
    return _backends.refuse_cpu(x.device.type) or refuse_cuda_layout(layout)


def _launch_cpu(
    x: Tensor,
    qvalues: Tensor,
    meta: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    layout: str,
    out: Tensor,
) -> None:
    kernels: Any = _backends.compiled_module("_cpu")[0]
    kernels.sparse24_w4a16_gemm(
        x.data_ptr(),
        qvalues.data_ptr(),
        meta.data_ptr(),
        scales.data_ptr(),
        pointer(zeros),
        pointer(bias),
        out.data_ptr(),
        *out.shape,
        x.shape[1],
        x.stride(0),
        group_size,
        DTYPE_CODES[x.dtype],
        DTYPE_CODES[scales.dtype],
        LAYOUT_CODES[layout],
    )


def _launch_reference(
    x: Tensor,
    qvalues: Tensor,
    meta: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    layout: str,
    out: Tensor,
) -> None:
    weight = canonical_int4_weight(qvalues, meta, scales, zeros, group_size, layout)
    out.copy_(_reference(x, *weight, bias, group_size))


def _refuse_cuda(
    x: Tensor,
    qvalues: Tensor,
    meta: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    layout: str,
    out: Tensor,
) -> str | None:
    return _sparse24_cuda.refuse(x, qvalues, layout)


def _launch_cuda(
    x: Tensor,
    qvalues: Tensor,
    meta: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    layout: str,
    out: Tensor,
) -> None:
    _sparse24_cuda.launch_codes(x, qvalues, scales, bias, group_size, out)


def _refuse_triton(
    x: Tensor,
    qvalues: Tensor,
    meta: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    layout: str,
    out: Tensor,
) -> str | None:
    return refuse_triton_weight(qvalues, layout)


def _launch_triton(*args: Any) -> None:
    from llmkern.triton_kernels.sparse24_w4a16_gemm import launch

    launch(*args)


BACKENDS = (
    Backend("cuda", _refuse_cuda, _launch_cuda),
    Backend("triton", _refuse_triton, _launch_triton),
    Backend("cpu", _refuse_cpu, _launch_cpu),
    Backend("reference", _backends.never_refuse, _launch_reference),
)


def _check(
    x: Tensor,
    qvalues: Tensor,
    meta: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    layout: str,
) -> None:
    op = "sparse24_w4a16_gemm"
    check_int4_weight(op, qvalues, meta, scales, zeros, group_size, layout)
    N, K = int4_weight_shape(scales, group_size, layout)
    if x.dim() != 2 or x.shape[1] != K or x.dtype not in FLOATS:
        expect(False, op, "x", x, f"float32, bfloat16 or float16 [M, {K}]")
    if x.device != scales.device:
        expect(False, op, "x", x, f"the device of scales, {scales.device}")
    if bias is None:
        return
    if bias.shape != (N,) or bias.dtype != x.dtype or bias.device != x.device:
        wanted = f"{str(x.dtype).removeprefix('torch.')} [{N}] on {x.device}"
        expect(False, op, "bias", bias, wanted)


def _fake(
    x: Tensor,
    qvalues: Tensor,
    meta: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    layout: str,
) -> Tensor:
    _check(x, qvalues, meta, scales, zeros, bias, group_size, layout)
    return x.new_empty(x.shape[0], int4_weight_shape(scales, group_size, layout)[0])


def _run(
    x: Tensor,
    qvalues: Tensor,
    meta: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    layout: str,
) -> Tensor:
    out = _fake(x, qvalues, meta, scales, zeros, bias, group_size, layout)
    if out.numel() == 0:
        return out
    # Kernels read rows of x at any distance, but each row and the bias contiguously.
    if x.stride(1) != 1 and x.shape[1] != 1:
        x = x.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    args = (x, qvalues, meta, scales, zeros, bias, group_size, layout)
    _backends.choose("sparse24_w4a16_gemm", BACKENDS, *args, out).launch(*args, out)
    return out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, qvalues, meta, scales, zeros, _, ctx.group_size, ctx.layout = inputs
    ctx.save_for_backward(qvalues, meta, scales, zeros)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ dequantize_sparse24(
            *ctx.saved_tensors, group_size=ctx.group_size, dtype=grad.dtype, layout=ctx.layout
        )
    if ctx.needs_input_grad[5]:
        grad_bias = grad.sum(0)
    return grad_x, None, None, None, None, grad_bias, None, None


_op = register(SCHEMA, _run, _fake)
torch.library.register_autograd(
    "llmkern::sparse24_w4a16_gemm", _backward, setup_context=_setup_context, lib=LIBRARY
)


def sparse24_w4a16_gemm(
    x: Tensor,
    qvalues: Tensor,
    meta: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_size: int,
    layout: str = "canonical",
) -> Tensor:
    """Product with a 4-bit 2:4 weight: y = x @ wᵀ + bias, w = scales * (codes - zeros) where kept.

    Differentiable in x and bias (the backward pass expands the weight), so adapters can be trained on
    top of it.

    Columns of x that a row of w does not keep are not read for it: a NaN or Inf there may or may not
    reach that output. One in a kept column does.

    On CUDA devices the cuda layout with 16-bit x runs on the sparse tensor cores (mma.sp): up to M = 256
    no weight is rounded; above, where there is work enough for 128 x 128 tiles of y, each is rounded to
    x's dtype once. The canonical layout, and float32 x, run in Triton.

    Args:
        x: float32, bfloat16 or float16 [..., K], any leading shape; K a multiple of 32.
        qvalues: int32 [N, K/16] the kept codes, in the canonical layout of
            `llmkern.formats.sparse24`, or a backend's repacked one as named by `layout`.
        meta: uint8 [N, K/8] which columns they are, likewise. Only the six nibbles that the format has
            are read rightly (`llmkern.formats.sparse24.check_meta`).
        scales: float32, bfloat16 or float16 [N, K/group_size] (transposed in repacked layouts).
        zeros: int32 [ceil(N/8), K/group_size] packed zero points, or None for the constant 8.
        bias: [N] in x's dtype, or None.
        group_size: columns of the dense weight per scale, a multiple of 32.
        layout: "canonical", "cpu" or "cuda".

    Returns:
        y [..., N] in x's dtype, accumulated in float32.

    Raises:
        ValueError: an argument's dtype, shape, device or layout is not as above.
        NotImplementedError: a backend was forced that cannot serve the call.
    """
    if x.dim() == 2:
        y: Tensor = _op(x, qvalues, meta, scales, zeros, bias, group_size, layout)
        return y
    rows = x.reshape(-1, x.shape[-1])
    y = _op(rows, qvalues, meta, scales, zeros, bias, group_size, layout)
    return y.view(*x.shape[:-1], y.shape[-1])
