"""dequantize_int4: dense weight from 4-bit codes, w = scales * (codes - zeros)."""

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
from llmkern.ops._library import DTYPE_CODES, FLOATS, LAYOUT_CODES, pointer, register
from llmkern.reference.w4a16_gemm import dequantize_int4 as _reference

SCHEMA = (
    "dequantize_int4(Tensor qweight, Tensor scales, Tensor? zeros, int group_size, str layout, "
    "ScalarType dtype) -> Tensor"
)


def _refuse_cpu(qweight: Tensor, *_: Any) -> str | None:
    return _backends.refuse_cpu(qweight.device.type)


def _launch_cpu(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    layout: str,
    out: Tensor,
) -> None:
    kernels: Any = _backends.compiled_module("_cpu")[0]
    kernels.dequantize_int4(
        qweight.data_ptr(),
        scales.data_ptr(),
        pointer(zeros),
        out.data_ptr(),
        *out.shape,
        group_size,
        DTYPE_CODES[out.dtype],
        DTYPE_CODES[scales.dtype],
        LAYOUT_CODES[layout],
    )


def _launch_reference(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    layout: str,
    out: Tensor,
) -> None:
    weight = canonical_weight(qweight, scales, zeros, group_size, layout)
    out.copy_(_reference(*weight, group_size, out.dtype))


def _refuse_cuda(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    layout: str,
    out: Tensor,
) -> str | None:
    return refuse_cuda_weight(qweight, layout)


def _launch_cuda(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    layout: str,
    out: Tensor,
) -> None:
    module, _ = _backends.compiled_module("_cuda")
    assert module is not None
    module.dequantize_int4(
        pointer(qweight),
        pointer(scales),
        cuda_zeros(qweight, scales, zeros, group_size, layout),
        pointer(out),
        *out.shape,
        group_size,
        DTYPE_CODES[out.dtype],
        DTYPE_CODES[scales.dtype],
        LAYOUT_CODES[layout],
        *_backends.cuda_queue(out.device),
    )


def _refuse_triton(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    layout: str,
    out: Tensor,
) -> str | None:
    return refuse_triton_weight(qweight, layout)


def _launch_triton(*args: Any) -> None:
    from llmkern.triton_kernels.dequantize_int4 import launch

    launch(*args)


BACKENDS = (
    Backend("cuda", _refuse_cuda, _launch_cuda),
    Backend("triton", _refuse_triton, _launch_triton),
    Backend("cpu", _refuse_cpu, _launch_cpu),
    Backend("reference", _backends.never_refuse, _launch_reference),
)


def _check(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    layout: str,
    dtype: torch.dtype,
) -> None:
    check_weight("dequantize_int4", qweight, scales, zeros, group_size, layout)
    if dtype not in FLOATS:
        raise ValueError(
            f"dequantize_int4: dtype: got {dtype}, expected float32, bfloat16 or float16"
        )


def _fake(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    _check(qweight, scales, zeros, group_size, layout, dtype)
    return scales.new_empty(weight_shape(scales, group_size, layout), dtype=dtype)


def _run(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    out = _fake(qweight, scales, zeros, group_size, layout, dtype)
    args = (qweight, scales, zeros, group_size, layout)
    _backends.choose("dequantize_int4", BACKENDS, *args, out).launch(*args, out)
    return out


_op = register(SCHEMA, _run, _fake)


def dequantize_int4(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    group_size: int,
    dtype: torch.dtype | None = None,
    layout: str = "canonical",
) -> Tensor:
    """Dense weight of a 4-bit one: w[n, k] = scales[n, g] * (codes[n, k] - zeros[n, g]).

    Args:
        qweight: int32 [N, K/8], the canonical layout of `llmkern.formats.int4`, or a backend's
            repacked one as named by `layout`.
        scales: float32, bfloat16 or float16 [N, K/group_size].
        zeros: int32 [ceil(N/8), K/group_size] packed zero points, or None for the constant 8.
        group_size: K-elements per scale, a multiple of 32.
        dtype: of the result; by default that of `scales`.
        layout: "canonical", "cpu" or "cuda".

    Returns:
        [N, K] in `dtype`; the product is formed in float32 and rounded once.

    Raises:
        ValueError: an argument's dtype, shape, device or layout is not as above.
    """
    w: Tensor = _op(qweight, scales, zeros, group_size, layout, dtype or scales.dtype)
    return w
