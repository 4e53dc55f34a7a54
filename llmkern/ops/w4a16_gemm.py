"""w4a16_gemm: y = x @ dequantize(qweight).T + bias, 4-bit weights, 16- or 32-bit activations.

Weight-only quantization as in GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978); at small M the
product is bound by reading the weights, which are 4x smaller than in bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern import _backends
from llmkern._backends import Backend
from llmkern.ops._int4_weight import (
    canonical_weight,
    check_weight,
    cuda_zeros,
    refuse_cuda_weight,
    refuse_triton_weight,
    weight_shape,
)
from llmkern.ops._library import (
    DTYPE_CODES,
    FLOATS,
    LAYOUT_CODES,
    LIBRARY,
    expect,
    pointer,
    register,
)
from llmkern.ops._w4a16_config import CHUNK_ROWS, DENSE_BYTES, select_config
from llmkern.ops.dequantize_int4 import dequantize_int4
from llmkern.reference.w4a16_gemm import w4a16_gemm as _reference

SCHEMA = (
    "w4a16_gemm(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, "
    "int group_size, str layout, str activation) -> Tensor"
)


ACTIVATIONS = ("float", "int8")


def _refuse_int8(activation: str) -> str | None:
    return None if activation == "float" else f"activation {activation!r} is served on the CPU only"


def _refuse_cpu(x: Tensor, *_: Any) -> str | None:
    return _backends.refuse_cpu(x.device.type)


def _launch_cpu(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    layout: str,
    activation: str,
    out: Tensor,
) -> None:
    kernels: Any = _backends.compiled_module("_cpu")[0]
    kernels.w4a16_gemm(
        x.data_ptr(),
        qweight.data_ptr(),
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
        activation == "int8",
    )


def _launch_reference(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    layout: str,
    activation: str,
    out: Tensor,
) -> None:
    weight = canonical_weight(qweight, scales, zeros, group_size, layout)
    out.copy_(_reference(x, *weight, bias, group_size, activation))


def _refuse_cuda(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    layout: str,
    activation: str,
    out: Tensor,
) -> str | None:
    return _refuse_int8(activation) or refuse_cuda_weight(qweight, layout)


def _launch_cuda(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    layout: str,
    activation: str,
    out: Tensor,
) -> None:
    rows, split, bulk, workspace = 0, 1, False, None
    if layout == "cuda":
        sm = _backends.cuda_capability(x.device)
        config = select_config(out.shape[0], out.shape[1], x.shape[1], group_size, sm)
        if config.tier == "dense" or x.dtype == torch.float32:
            return _multiply_dense(x, qweight, scales, bias, group_size, out)
        rows, split, bulk = config.rows, config.split, config.bulk
        if x.data_ptr() % 16 or x.stride(0) % 8:
            x = x.clone(memory_format=torch.contiguous_format)  # is copied in 16-byte pieces
        if split > 1 and not bulk:
            workspace = x.new_empty((split, *out.shape), dtype=torch.float32)
    module, _ = _backends.compiled_module("_cuda")
    assert module is not None
    module.w4a16_gemm(
        pointer(x),
        pointer(qweight),
        pointer(scales),
        cuda_zeros(qweight, scales, zeros, group_size, layout),
        pointer(bias),
        pointer(out),
        *out.shape,
        x.shape[1],
        x.stride(0),
        group_size,
        DTYPE_CODES[x.dtype],
        DTYPE_CODES[scales.dtype],
        LAYOUT_CODES[layout],
        rows,
        split,
        bulk,
        pointer(workspace),
        *_backends.cuda_queue(x.device),
    )


def _multiply_dense(
    x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, group_size: int, out: Tensor
) -> None:
    """Large M, and float32 x, over the cuda layout: dequantize pieces that stay in L2, and cuBLAS."""
    N, K = weight_shape(scales, group_size, "cuda")
    tiles = max(1, DENSE_BYTES // (CHUNK_ROWS * K * x.element_size()))
    for first in range(0, N, tiles * CHUNK_ROWS):
        last = min(first + tiles * CHUNK_ROWS, N)
        w = dequantize_int4(
            qweight[first // CHUNK_ROWS : -(-last // CHUNK_ROWS)],
            scales[:, first:last],
            group_size=group_size,
            dtype=x.dtype,
            layout="cuda",
        )
        piece = out[:, first:last]
        if bias is None:
            torch.mm(x, w.t(), out=piece)
        else:
            torch.addmm(bias[first:last], x, w.t(), out=piece)


def _refuse_triton(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    layout: str,
    activation: str,
    out: Tensor,
) -> str | None:
    return _refuse_int8(activation) or refuse_triton_weight(qweight, layout)


def _launch_triton(*args: Any) -> None:
    from llmkern.triton_kernels.w4a16_gemm import launch

    *operands, _activation, out = args
    launch(*operands, out)


BACKENDS = (
    Backend("cuda", _refuse_cuda, _launch_cuda),
    Backend("triton", _refuse_triton, _launch_triton),
    Backend("cpu", _refuse_cpu, _launch_cpu),
    Backend("reference", _backends.never_refuse, _launch_reference),
)


def _check(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    layout: str,
    activation: str,
) -> None:
    op = "w4a16_gemm"
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{op}: activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}"
        )
    check_weight(op, qweight, scales, zeros, group_size, layout)
    N, K = weight_shape(scales, group_size, layout)
    expect(
        x.dim() == 2 and x.shape[1] == K and x.dtype in FLOATS,
        op,
        "x",
        x,
        f"float32, bfloat16 or float16 [M, {K}]",
    )
    if x.device != scales.device:
        expect(False, op, "x", x, f"the device of scales, {scales.device}")
    if bias is None:
        return
    if bias.shape != (N,) or bias.dtype != x.dtype or bias.device != x.device:
        wanted = f"{str(x.dtype).removeprefix('torch.')} [{N}] on {x.device}"
        expect(False, op, "bias", bias, wanted)


def _fake(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    layout: str,
    activation: str,
) -> Tensor:
    _check(x, qweight, scales, zeros, bias, group_size, layout, activation)
    return x.new_empty(x.shape[0], weight_shape(scales, group_size, layout)[0])


def _run(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    layout: str,
    activation: str,
) -> Tensor:
    out = _fake(x, qweight, scales, zeros, bias, group_size, layout, activation)
    if out.numel() == 0:
        return out
    # Kernels read rows of x at any distance, but each row and the bias contiguously.
    if x.stride(1) != 1 and x.shape[1] != 1:
        x = x.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    args = (x, qweight, scales, zeros, bias, group_size, layout, activation)
    _backends.choose("w4a16_gemm", BACKENDS, *args, out).launch(*args, out)
    return out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, qweight, scales, zeros, _, ctx.group_size, ctx.layout, _ = inputs
    ctx.save_for_backward(qweight, scales, zeros)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    qweight, scales, zeros = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        w = dequantize_int4(
            qweight, scales, zeros, group_size=ctx.group_size, dtype=grad.dtype, layout=ctx.layout
        )
        grad_x = grad @ w
    if ctx.needs_input_grad[4]:
        grad_bias = grad.sum(0)
    return grad_x, None, None, None, grad_bias, None, None, None


_op = register(SCHEMA, _run, _fake)
torch.library.register_autograd(
    "llmkern::w4a16_gemm", _backward, setup_context=_setup_context, lib=LIBRARY
)


def w4a16_gemm(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_size: int,
    layout: str = "canonical",
    activation: str = "float",
) -> Tensor:
    """Product with a 4-bit weight: y = x @ wᵀ + bias, w = scales * (codes - zeros).

    Differentiable in x and bias (the backward pass dequantizes the weight), so adapters can be
    trained on top of it.

    On CUDA devices the cuda layout with 16-bit x runs on tensor cores: up to M = 1023 no weight is
    rounded and a row of y depends on nothing but its row of x, the weight and whether M is above 32;
    from M = 1024 on, and for float32 x, the weight is dequantized to x's dtype for cuBLAS.

    On the CPU kernels a row of y depends on nothing but its row of x and the weight: not on M, the
    number of threads or the instruction set; except that bfloat16 x is summed in float32 with AMX, from
    five rows on (a row of y is the same for every such M), and by the bfloat16 dot products of AMD's CPUs
    (zen4: the same for every M). A NaN or Inf in a row of x stays in that row of y.

    Args:
        x: float32, bfloat16 or float16 [..., K], any leading shape; K a multiple of 32.
        qweight: int32 [N, K/8], the canonical layout of `llmkern.formats.int4`, or a backend's
            repacked one as named by `layout`.
        scales: float32, bfloat16 or float16 [N, K/group_size] (transposed in repacked layouts).
        zeros: int32 [ceil(N/8), K/group_size] packed zero points, or None for the constant 8.
        bias: [N] in x's dtype, or None.
        group_size: K-elements per scale, a multiple of 32.
        layout: "canonical", "cpu" or "cuda".
        activation: "float" multiplies x as it is; "int8" first rounds each row of x to 8 bits, x ~
            q * max|x| / 127, which changes the result by about 1 % and takes a third of the
            arithmetic: for long prompts. CPU and reference backends only; gradients are those of
            "float".

    Returns:
        y [..., N] in x's dtype, accumulated in float32.

    Raises:
        ValueError: an argument's dtype, shape, device or layout is not as above.
        NotImplementedError: a backend was forced that cannot serve the call.
    """
    if x.dim() == 2:
        y: Tensor = _op(x, qweight, scales, zeros, bias, group_size, layout, activation)
        return y
    y = _op(
        x.reshape(-1, x.shape[-1]), qweight, scales, zeros, bias, group_size, layout, activation
    )
    return y.view(*x.shape[:-1], y.shape[-1])
