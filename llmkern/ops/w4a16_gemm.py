"""w4a16_gemm: y = x @ dequantize(qweight).T + bias, 4-bit weights, 16- or 32-bit activations.

Weight-only quantization as in GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978); at small M the
product is bound by reading the weights, which are 4x smaller than in bfloat16.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkern import _backends
from llmkern._backends import Backend
from llmkern._dtypes import FLOAT_NAMES
from llmkern.ops._code_gemm import (
    check_product,
    launch_cpu,
    launch_cuda,
    multiply_dense,
    multiply_rows,
    refuse_cpu,
    register_product,
    select_by,
)
from llmkern.ops._int4_weight import (
    canonical_weight,
    check_weight,
    cuda_zeros,
    refuse_cuda_weight,
    refuse_triton_weight,
    weight_shape,
)
from llmkern.ops._library import kernels, pointer
from llmkern.ops._w4a16_config import CHUNK_ROWS, Chunks
from llmkern.ops.dequantize_int4 import dequantize_int4
from llmkern.reference.w4a16_gemm import w4a16_gemm as _reference

SCHEMA = (
    "w4a16_gemm(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, "
    "int group_size, str layout, str activation) -> Tensor"
)


class Call(NamedTuple):
    """The op's arguments, as in `SCHEMA`."""

    x: Tensor
    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None
    group_size: int
    layout: str
    activation: str


ACTIVATIONS = ("float", "int8")

# Rows of x, in float32 and in 16 bits, from which a dense copy of the weight and the library's float32
# product take less time than a kernel without dot products of bytes: about where the two cross for N = K
# = 4096, on a Zen 4 held to these instruction sets. With its own our kernel wins at every M.
_DENSE_ROWS = {"portable": (16, 16), "avx2": (64, 128), "avx512": (256, 1024)}
# Of one piece of that copy: what a core's L2 and its share of L3 hold.
_DENSE_BYTES = 4 << 20


def _refuse_int8(activation: str) -> str | None:
    return None if activation == "float" else f"activation {activation!r} is served on the CPU only"


def _weight(call: Call, zeros: int) -> dict[str, Any]:
    return {
        "qweight": pointer(call.qweight),
        "scales": pointer(call.scales),
        "zeros": zeros,
        "group_size": call.group_size,
        "scales_dtype": FLOAT_NAMES[call.scales.dtype],
        "layout": call.layout,
        "int8_activation": call.activation == "int8",
    }


def _launch_cpu(call: Call, out: Tensor) -> None:
    rows = _DENSE_ROWS.get(kernels("_cpu").isa())
    if rows and len(out) >= rows[call.x.dtype != torch.float32] and call.activation == "float":
        return _multiply_dense(call, out)
    launch_cpu("w4a16_gemm", _weight(call, pointer(call.zeros)), call, out)


def _multiply_dense(call: Call, out: Tensor) -> None:
    """By the library, in float32."""
    qweight, scales, zeros = call.qweight, call.scales, call.zeros
    canonical = call.layout == "canonical"

    def dequantize_rows(first: int, last: int) -> Tensor:
        if canonical:
            weight = qweight[first:last], scales[first:last]
            points = None if zeros is None else zeros[first // 8 : -(-last // 8)]
        else:
            blocks = slice(first // CHUNK_ROWS, -(-last // CHUNK_ROWS))
            weight = qweight[blocks], scales[:, first:last].contiguous()
            points = None if zeros is None else zeros[:, first:last].contiguous()
        return dequantize_int4(
            *weight, points, group_size=call.group_size, dtype=torch.float32, layout=call.layout
        )

    bias = None if call.bias is None else call.bias.float()
    y = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    multiply_dense(call.x.float(), bias, y, dequantize_rows, _DENSE_BYTES)
    if y is not out:
        out.copy_(y)


def _launch_reference(call: Call, out: Tensor) -> None:
    weight = canonical_weight(*call[1:4], call.group_size, call.layout)
    out.copy_(_reference(call.x, *weight, call.bias, call.group_size, call.activation))


def _refuse_cuda(call: Call, out: Tensor) -> str | None:
    return _refuse_int8(call.activation) or refuse_cuda_weight(call.qweight, call.layout)


def _launch_cuda(call: Call, out: Tensor) -> None:
    qweight, scales = call.qweight, call.scales

    def dequantize_rows(first: int, last: int) -> Tensor:
        return dequantize_int4(
            qweight[first // CHUNK_ROWS : -(-last // CHUNK_ROWS)],
            scales[:, first:last],
            group_size=call.group_size,
            dtype=call.x.dtype,
            layout="cuda",
        )

    weight = _weight(call, cuda_zeros(*call[1:4], call.group_size, call.layout))
    select = select_by(Chunks(qweight.shape[-1])) if call.layout == "cuda" else None
    launch_cuda("w4a16_gemm", weight, call, out, select, dequantize_rows)


def _refuse_triton(call: Call, out: Tensor) -> str | None:
    return _refuse_int8(call.activation) or refuse_triton_weight(call.qweight, call.layout)


def _launch_triton(call: Call, out: Tensor) -> None:
    from llmkern.triton_kernels.w4a16_gemm import launch

    launch(*call[:-1], out)


BACKENDS = (
    Backend("cuda", _refuse_cuda, _launch_cuda),
    Backend("triton", _refuse_triton, _launch_triton),
    Backend("cpu", refuse_cpu, _launch_cpu),
    Backend("reference", _backends.never_refuse, _launch_reference),
)


def _checked_shape(call: Call) -> tuple[int, int]:
    op = "w4a16_gemm"
    if call.activation not in ACTIVATIONS:
        raise ValueError(
            f"{op}: activation: got {call.activation!r}, expected one of {', '.join(ACTIVATIONS)}"
        )
    check_weight(op, *call[1:4], call.group_size, call.layout)
    shape = weight_shape(call.scales, call.group_size, call.layout)
    check_product(op, call.x, call.bias, shape, call.scales.device)
    return shape


def _dense(call: Call, dtype: torch.dtype) -> Tensor:
    return dequantize_int4(*call[1:4], group_size=call.group_size, dtype=dtype, layout=call.layout)


_op = register_product(SCHEMA, Call, BACKENDS, _checked_shape, _dense)


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
    (zen4: the same for every M). Without dot products of bytes many rows (AVX2: 64 in float32, 128 in 16
    bits; AVX-512: 256 and 1024; else 16) are multiplied in float32 by torch, with a dense copy of a part
    of the weight at a time. A NaN or Inf in a row of x stays in that row of y.

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
    return multiply_rows(_op, x, qweight, scales, zeros, bias, group_size, layout, activation)
