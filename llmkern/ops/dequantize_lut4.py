"""dequantize_lut4: dense weight from codes into a book, w = scales * codebook[codes].

Part of a forward pass for many rows of x over the cuda layout only; otherwise of the backward pass and
of exports.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkern import _backends
from llmkern._backends import Backend
from llmkern._dtypes import FLOAT_NAMES, FLOATS
from llmkern.ops._int4_weight import refuse_cuda_weight
from llmkern.ops._library import kernels, pointer, register
from llmkern.ops._lut4_weight import (
    book_strides,
    canonical_weight,
    check_weight,
    cuda_scales,
    scales_name,
    weight_shape,
)
from llmkern.reference.lut4_gemm import dequantize_lut4 as _reference

SCHEMA = (
    "dequantize_lut4(Tensor qweight, Tensor codebook, Tensor? scales, int group_size, str layout, "
    "ScalarType dtype) -> Tensor"
)


class _Call(NamedTuple):
    qweight: Tensor
    codebook: Tensor
    scales: Tensor | None
    group_size: int
    layout: str
    dtype: torch.dtype

    def weight(self) -> tuple[Tensor, Tensor, Tensor | None, int, str]:
        return self.qweight, self.codebook, self.scales, self.group_size, self.layout

    def fields(self, out: Tensor, scales: int) -> dict[str, Any]:
        """What both compiled kernels take."""
        N, K = out.shape
        row, group = book_strides(self.codebook, K, self.group_size)
        return {
            "qweight": pointer(self.qweight),
            "codebook": pointer(self.codebook),
            "scales": scales,
            "N": N,
            "K": K,
            "group_size": self.group_size,
            "book_row_stride": row,
            "book_group_stride": group,
            "scales_dtype": scales_name(self.scales),
            "layout": self.layout,
            "out": pointer(out),
            "dtype": FLOAT_NAMES[self.dtype],
        }


def _refuse_cpu(call: _Call, out: Tensor) -> str | None:
    return _backends.refuse_cpu(call.qweight.device.type)


def _launch_cpu(call: _Call, out: Tensor) -> None:
    kernels("_cpu").dequantize_lut4(**call.fields(out, pointer(call.scales)))


def _launch_reference(call: _Call, out: Tensor) -> None:
    out.copy_(_reference(*canonical_weight(*call.weight()), call.group_size, out.dtype))


def _refuse_cuda(call: _Call, out: Tensor) -> str | None:
    return refuse_cuda_weight(call.qweight, call.layout)


def _launch_cuda(call: _Call, out: Tensor) -> None:
    device, stream = _backends.cuda_queue(out.device)
    fields = call.fields(out, cuda_scales(*call.weight()))
    kernels("_cuda").dequantize_lut4(**fields, device=device, stream=stream)


BACKENDS = (
    Backend("cuda", _refuse_cuda, _launch_cuda),
    Backend("cpu", _refuse_cpu, _launch_cpu),
    Backend("reference", _backends.never_refuse, _launch_reference),
)


def _fake(*args: Any) -> Tensor:
    call = _Call(*args)
    check_weight("dequantize_lut4", *call.weight())
    if call.dtype not in FLOATS:
        raise ValueError(
            f"dequantize_lut4: dtype: got {call.dtype}, expected float32, bfloat16 or float16"
        )
    shape = weight_shape(call.qweight, call.scales, call.group_size, call.layout)
    return call.qweight.new_empty(shape, dtype=call.dtype)


def _run(*args: Any) -> Tensor:
    out, call = _fake(*args), _Call(*args)
    if out.numel() == 0:
        return out
    _backends.choose("dequantize_lut4", BACKENDS, call, out).launch(call, out)
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
