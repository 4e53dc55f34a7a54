"""lut4_gemm: y = x @ w.T + bias with w = scales * codebook[codes], any book of 16 values.

NF4 as in QLoRA (arXiv 2305.14314), FP4, or a learned table per row as in SqueezeLLM (arXiv 2306.07629).
As with integer codes, a small M is bound by reading the weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkern import _backends
from llmkern._backends import Backend
from llmkern.ops._code_gemm import (
    check_product,
    launch_cpu,
    launch_cuda,
    multiply_rows,
    refuse_cpu,
    register_product,
    select_by,
)
from llmkern.ops._int4_weight import refuse_cuda_weight, refuse_triton_weight
from llmkern.ops._library import pointer
from llmkern.ops._lut4_weight import (
    book_strides,
    canonical_weight,
    check_weight,
    cuda_chunks,
    cuda_scales,
    scales_name,
    weight_shape,
)
from llmkern.ops._w4a16_config import CHUNK_ROWS
from llmkern.ops.dequantize_lut4 import dequantize_lut4
from llmkern.reference.lut4_gemm import lut4_gemm as _reference

SCHEMA = (
    "lut4_gemm(Tensor x, Tensor qweight, Tensor codebook, Tensor? scales, Tensor? bias, "
    "int group_size, str layout) -> Tensor"
)


class Call(NamedTuple):
    """The op's arguments, as in `SCHEMA`."""

    x: Tensor
    qweight: Tensor
    codebook: Tensor
    scales: Tensor | None
    bias: Tensor | None
    group_size: int
    layout: str


def _weight(call: Call, scales: int) -> dict[str, Any]:
    row, group = book_strides(call.codebook, call.x.shape[1], call.group_size)
    return {
        "qweight": pointer(call.qweight),
        "codebook": pointer(call.codebook),
        "scales": scales,
        "group_size": call.group_size,
        "book_row_stride": row,
        "book_group_stride": group,
        "scales_dtype": scales_name(call.scales),
        "layout": call.layout,
    }


def _launch_cpu(call: Call, out: Tensor) -> None:
    launch_cpu("lut4_gemm", _weight(call, pointer(call.scales)), call, out)


def _launch_reference(call: Call, out: Tensor) -> None:
    weight = canonical_weight(*call[1:4], call.group_size, call.layout)
    out.copy_(_reference(call.x, *weight, call.bias, call.group_size))


def _refuse_cuda(call: Call, out: Tensor) -> str | None:
    return refuse_cuda_weight(call.qweight, call.layout)


def _launch_cuda(call: Call, out: Tensor) -> None:
    qweight, codebook, scales = call[1:4]

    def dequantize_rows(first: int, last: int) -> Tensor:
        assert scales is not None
        return dequantize_lut4(
            qweight[first // CHUNK_ROWS : -(-last // CHUNK_ROWS)],
            codebook if codebook.dim() == 1 else codebook[first:last],
            scales[:, first:last],
            group_size=call.group_size,
            dtype=call.x.dtype,
            layout="cuda",
        )

    present = cuda_scales(qweight, codebook, scales, call.group_size, call.layout)
    select = select_by(cuda_chunks(qweight, codebook)) if call.layout == "cuda" else None
    launch_cuda("lut4_gemm", _weight(call, present), call, out, select, dequantize_rows)


def _refuse_triton(call: Call, out: Tensor) -> str | None:
    return refuse_triton_weight(call.qweight, call.layout)


def _launch_triton(call: Call, out: Tensor) -> None:
    from llmkern.triton_kernels.lut4_gemm import launch

    launch(*call, out)


BACKENDS = (
    Backend("cuda", _refuse_cuda, _launch_cuda),
    Backend("triton", _refuse_triton, _launch_triton),
    Backend("cpu", refuse_cpu, _launch_cpu),
    Backend("reference", _backends.never_refuse, _launch_reference),
)


def _checked_shape(call: Call) -> tuple[int, int]:
    check_weight("lut4_gemm", *call[1:4], call.group_size, call.layout)
    shape = weight_shape(call.qweight, call.scales, call.group_size, call.layout)
    check_product("lut4_gemm", call.x, call.bias, shape, call.qweight.device)
    return shape


def _dense(call: Call, dtype: torch.dtype) -> Tensor:
    return dequantize_lut4(*call[1:4], group_size=call.group_size, dtype=dtype, layout=call.layout)


_op = register_product(SCHEMA, Call, BACKENDS, _checked_shape, _dense)


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

    On CUDA devices the cuda layout with 16-bit x runs on tensor cores, with the book's entries rounded
    to x's dtype, which must be able to hold them: up to M = 1023 scales are applied to sums in float32,
    and a row of y depends on nothing but its row of x, the weight and whether M is above 32; from
    M = 1024 on, and for float32 x, the weight is dequantized to x's dtype for cuBLAS. In the canonical
    layout nothing is rounded.

    The CPU kernels round nothing either, except for bfloat16 x on AMX from eight rows on and on AMD's
    CPUs with bfloat16 dot products (zen4): there w is rounded to bfloat16 once, as dequantizing does. On
    zen4 up to 12 rows and one book round the book's entries instead, after a scaling that suits them: the
    errors are smaller then.

    Args:
        x: float32, bfloat16 or float16 [..., K], any leading shape.
        qweight: int32 [N, K/8], the canonical layout of `llmkern.formats.lut4`, or a backend's
            repacked one as named by `layout`.
        codebook: float32 [16] (one book), [N, 16] (one per row) or [N, K/group_size, 16] (one per
            group).
        scales: float32, bfloat16 or float16 [N, K/group_size], or None for the constant 1; in the cuda
            layout what `llmkern.formats.lut4_cuda` makes of it.
        bias: [N] in x's dtype, or None.
        group_size: K-elements per scale, a multiple of 32 that divides K.
        layout: "canonical", "cpu" or "cuda".

    Returns:
        y [..., N] in x's dtype, accumulated in float32.

    Raises:
        ValueError: an argument's dtype, shape, device or layout is not as above.
        NotImplementedError: a backend was forced that cannot serve the call.
    """
    return multiply_rows(_op, x, qweight, codebook, scales, bias, group_size, layout)
