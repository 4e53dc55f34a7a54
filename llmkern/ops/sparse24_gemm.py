"""sparse24_gemm: y = x @ w.T + bias with a 2:4 sparse w, half of whose columns are stored.

2:4 sparsity as NVIDIA's sparse tensor cores have it (arXiv 2104.08378). A small M is bound by reading
the weight, which is 0.5625 of a dense 16-bit one; a large M by arithmetic, of which half remains.
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
    canonical_weight,
    check_weight,
    refuse_cuda_layout,
    weight_shape,
)
from llmkern.ops.dequantize_sparse24 import dequantize_sparse24
from llmkern.reference.sparse24_gemm import sparse24_gemm as _reference

SCHEMA = "sparse24_gemm(Tensor x, Tensor values, Tensor meta, Tensor? bias, str layout) -> Tensor"


def _refuse_cpu(
    x: Tensor, values: Tensor, meta: Tensor, bias: Any, layout: str, *_: Any
) -> str | None:
    return _backends.refuse_cpu(x.device.type) or refuse_cuda_layout(layout)


def _launch_cpu(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, layout: str, out: Tensor
) -> None:
    kernels: Any = _backends.compiled_module("_cpu")[0]
    kernels.sparse24_gemm(
        x.data_ptr(),
        values.data_ptr(),
        meta.data_ptr(),
        pointer(bias),
        out.data_ptr(),
        *out.shape,
        x.shape[1],
        x.stride(0),
        DTYPE_CODES[x.dtype],
        LAYOUT_CODES[layout],
    )


def _launch_reference(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, layout: str, out: Tensor
) -> None:
    out.copy_(_reference(x, *canonical_weight(values, meta, layout), bias))


def _refuse_cuda(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, layout: str, out: Tensor
) -> str | None:
    return _sparse24_cuda.refuse(x, values, layout)


def _launch_cuda(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, layout: str, out: Tensor
) -> None:
    _sparse24_cuda.launch_values(x, values, bias, out)


def _refuse_triton(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, layout: str, out: Tensor
) -> str | None:
    return refuse_triton_weight(values, layout)


def _launch_triton(*args: Any) -> None:
    from llmkern.triton_kernels.sparse24_gemm import launch

    launch(*args)


BACKENDS = (
    Backend("cuda", _refuse_cuda, _launch_cuda),
    Backend("triton", _refuse_triton, _launch_triton),
    Backend("cpu", _refuse_cpu, _launch_cpu),
    Backend("reference", _backends.never_refuse, _launch_reference),
)


def _check(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, layout: str) -> None:
    op = "sparse24_gemm"
    check_weight(op, values, meta, layout)
    N, K = weight_shape(values, meta, layout)
    if x.dim() != 2 or x.shape[1] != K or x.dtype not in FLOATS:
        expect(False, op, "x", x, f"float32, bfloat16 or float16 [M, {K}]")
    if x.dtype != values.dtype:
        expect(
            False, op, "x", x, f"the dtype of values, {str(values.dtype).removeprefix('torch.')}"
        )
    if x.device != values.device:
        expect(False, op, "x", x, f"the device of values, {values.device}")
    if bias is None:
        return
    if bias.shape != (N,) or bias.dtype != x.dtype or bias.device != x.device:
        wanted = f"{str(x.dtype).removeprefix('torch.')} [{N}] on {x.device}"
        expect(False, op, "bias", bias, wanted)


def _fake(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, layout: str) -> Tensor:
    _check(x, values, meta, bias, layout)
    return x.new_empty(x.shape[0], weight_shape(values, meta, layout)[0])


def _run(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, layout: str) -> Tensor:
    out = _fake(x, values, meta, bias, layout)
    if out.numel() == 0:
        return out
    # Kernels read rows of x at any distance, but each row and the bias contiguously.
    if x.stride(1) != 1 and x.shape[1] != 1:
        x = x.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    args = (x, values, meta, bias, layout)
    _backends.choose("sparse24_gemm", BACKENDS, *args, out).launch(*args, out)
    return out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, values, meta, _, ctx.layout = inputs
    ctx.save_for_backward(values, meta)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, meta = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ dequantize_sparse24(values, meta, dtype=grad.dtype, layout=ctx.layout)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.sum(0)
    return grad_x, None, None, grad_bias, None


_op = register(SCHEMA, _run, _fake)
torch.library.register_autograd(
    "llmkern::sparse24_gemm", _backward, setup_context=_setup_context, lib=LIBRARY
)


def sparse24_gemm(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    bias: Tensor | None = None,
    *,
    layout: str = "canonical",
) -> Tensor:
    """Product with a 2:4 sparse weight: y = x @ wᵀ + bias, w = decompress(values, meta).

    Differentiable in x and bias (the backward pass expands the weight), so adapters can be trained on
    top of it.

    Columns of x that a row of w does not keep are not read for it: a NaN or Inf there may or may not
    reach that output. One in a kept column does.

    On CUDA devices the cuda layout with 16-bit x runs on the sparse tensor cores (mma.sp), which also
    halve the arithmetic; the canonical layout, and float32 x, run in Triton, which reads what is stored
    and multiplies all of it.

    Args:
        x: float32, bfloat16 or float16 [..., K], any leading shape; K a multiple of 8.
        values: the kept values in x's dtype, [N, K/2] in the canonical layout of
            `llmkern.formats.sparse24`, or a backend's repacked one as named by `layout`.
        meta: uint8 [N, K/8] which columns they are, likewise. Only the six nibbles that the format has
            are read rightly (`llmkern.formats.sparse24.check_meta`).
        bias: [N] in x's dtype, or None.
        layout: "canonical", "cpu" or "cuda".

    Returns:
        y [..., N] in x's dtype, accumulated in float32.

    Raises:
        ValueError: an argument's dtype, shape, device or layout is not as above.
        NotImplementedError: a backend was forced that cannot serve the call.
    """
    if x.dim() == 2:
        y: Tensor = _op(x, values, meta, bias, layout)
        return y
    y = _op(x.reshape(-1, x.shape[-1]), values, meta, bias, layout)
    return y.view(*x.shape[:-1], y.shape[-1])
