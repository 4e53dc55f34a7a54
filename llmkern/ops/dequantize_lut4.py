"""dequantize_lut4: dense weight from codes into a book, w = scales * codebook[codes].

Part of a forward pass for many rows of x over the cuda layout only; otherwise of the backward pass and
of exports.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern import _backends
from llmkern._backends import Backend
from llmkern.ops._int4_weight import refuse_cuda_weight
from llmkern.ops._library import DTYPE_CODES, FLOATS, LAYOUT_CODES, pointer, register
from llmkern.ops._lut4_weight import canonical_weight, check_weight, cuda_scales, weight_shape
from llmkern.reference.lut4_gemm import dequantize_lut4 as _reference

SCHEMA = (
    "dequantize_lut4(Tensor qweight, Tensor codebook, Tensor? scales, int group_size, str layout, "
    "ScalarType dtype) -> Tensor"
)


def _refuse_cpu(qweight: Tensor, *_: Any) -> str | None:
    return _backends.refuse_cpu(qweight.device.type)


def _launch_cpu(
    qweight: Tensor,
    codebook: Tensor,
    scales: Tensor | None,
    group_size: int,
    layout: str,
    out: Tensor,
) -> None:
    kernels: Any = _backends.compiled_module("_cpu")[0]
    kernels.dequantize_lut4(
        qweight.data_ptr(),
        codebook.data_ptr(),
        pointer(scales),
        out.data_ptr(),
        *out.shape,
        group_size,
        codebook.dim() - 1,
        DTYPE_CODES[out.dtype],
        0 if scales is None else DTYPE_CODES[scales.dtype],
        LAYOUT_CODES[layout],
    )


def _launch_reference(
    qweight: Tensor,
    codebook: Tensor,
    scales: Tensor | None,
    group_size: int,
    layout: str,
    out: Tensor,
) -> None:
    weight = canonical_weight(qweight, codebook, scales, group_size, layout)
    out.copy_(_reference(*weight, group_size, out.dtype))


def _refuse_cuda(
    qweight: Tensor,
    codebook: Tensor,
    scales: Tensor | None,
    group_size: int,
    layout: str,
    out: Tensor,
) -> str | None:
    return refuse_cuda_weight(qweight, layout)


def _launch_cuda(
    qweight: Tensor,
    codebook: Tensor,
    scales: Tensor | None,
    group_size: int,
    layout: str,
    out: Tensor,
) -> None:
    kernels: Any = _backends.compiled_module("_cuda")[0]
    kernels.dequantize_lut4(
        qweight.data_ptr(),
        codebook.data_ptr(),
        cuda_scales(qweight, codebook, scales, group_size, layout),
        out.data_ptr(),
        *out.shape,
        group_size,
        codebook.dim() - 1,
        DTYPE_CODES[out.dtype],
        0 if scales is None else DTYPE_CODES[scales.dtype],
        LAYOUT_CODES[layout],
        *_backends.cuda_queue(qweight.device),
    )


BACKENDS = (
    Backend("cuda", _refuse_cuda, _launch_cuda),
    Backend("cpu", _refuse_cpu, _launch_cpu),
    Backend("reference", _backends.never_refuse, _launch_reference),
)


def _check(
    qweight: Tensor,
    codebook: Tensor,
    scales: Tensor | None,
    group_size: int,
    layout: str,
    dtype: torch.dtype,
) -> None:
    check_weight("dequantize_lut4", qweight, codebook, scales, group_size, layout)
    if dtype not in FLOATS:
        raise ValueError(
            f"dequantize_lut4: dtype: got {dtype}, expected float32, bfloat16 or float16"
        )


def _fake(
    qweight: Tensor,
    codebook: Tensor,
    scales: Tensor | None,
    group_size: int,
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    _check(qweight, codebook, scales, group_size, layout, dtype)
    shape = weight_shape(qweight, scales, group_size, layout)
    return qweight.new_empty(shape, dtype=dtype)


def _run(
    qweight: Tensor,
    codebook: Tensor,
    scales: Tensor | None,
    group_size: int,
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    out = _fake(qweight, codebook, scales, group_size, layout, dtype)
    if out.numel() == 0:
        return out
    args = (qweight, codebook, scales, group_size, layout)
    _backends.choose("dequantize_lut4", BACKENDS, *args, out).launch(*args, out)
    return out


_op = register(SCHEMA, _run, _fake)


def dequantize_lut4(
    qweight: Tensor,
    codebook: Tensor,
    scales: Tensor | None = None,
    *,
    group_size: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "canonical",
) -> Tensor:
    """Dense weight: w[n, k] = scales[n, g] * codebook[.., codes[n, k]], g = k // group_size.

    Args:
        qweight: int32 [N, K/8], the canonical layout of `llmkern.formats.lut4`, or a backend's
            repacked one as named by `layout`.
        codebook: float32 [16], [N, 16] or [N, K/group_size, 16].
        scales: float32, bfloat16 or float16 [N, K/group_size], or None for the constant 1.
        group_size: K-elements per scale, a multiple of 32 that divides K.
        dtype: of the result.
        layout: "canonical", "cpu" or "cuda".

    Returns:
        [N, K] in `dtype`; the product is formed in float32 and rounded once.

    Raises:
        ValueError: an argument's dtype, shape, device or layout is not as above.
        NotImplementedError: a backend was forced that cannot serve the call.
    """
    w: Tensor = _op(qweight, codebook, scales, group_size, layout, dtype)
    return w
