"""dequantize_int4: dense weight from 4-bit codes, w = scales * (codes - zeros)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkern import _backends
from llmkern._backends import Backend
from llmkern._dtypes import FLOAT_NAMES, FLOATS
from llmkern.ops._int4_weight import (
    canonical_weight,
    check_weight,
    cuda_zeros,
    refuse_cuda_weight,
    refuse_triton_weight,
    weight_shape,
)
from llmkern.ops._library import kernels, pointer, register
from llmkern.reference.w4a16_gemm import dequantize_int4 as _reference

SCHEMA = (
    "dequantize_int4(Tensor qweight, Tensor scales, Tensor? zeros, int group_size, str layout, "
    "ScalarType dtype) -> Tensor"
)


class _Call(NamedTuple):
    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    group_size: int
    layout: str
    dtype: torch.dtype

    def weight(self) -> tuple[Tensor, Tensor, Tensor | None, int, str]:
        return self.qweight, self.scales, self.zeros, self.group_size, self.layout

    def fields(self, out: Tensor, zeros: int) -> dict[str, Any]:
        """What both compiled kernels take."""
        N, K = out.shape
        return {
            "qweight": pointer(self.qweight),
            "scales": pointer(self.scales),
            "zeros": zeros,
            "N": N,
            "K": K,
            "group_size": self.group_size,
            "scales_dtype": FLOAT_NAMES[self.scales.dtype],
            "layout": self.layout,
            "out": pointer(out),
            "dtype": FLOAT_NAMES[self.dtype],
        }


def _refuse_cpu(call: _Call, out: Tensor) -> str | None:
    return _backends.refuse_cpu(call.qweight.device.type)


def _launch_cpu(call: _Call, out: Tensor) -> None:
    kernels("_cpu").dequantize_int4(**call.fields(out, pointer(call.zeros)))


def _launch_reference(call: _Call, out: Tensor) -> None:
    out.copy_(_reference(*canonical_weight(*call.weight()), call.group_size, out.dtype))


def _refuse_cuda(call: _Call, out: Tensor) -> str | None:
    return refuse_cuda_weight(call.qweight, call.layout)


def _launch_cuda(call: _Call, out: Tensor) -> None:
    device, stream = _backends.cuda_queue(out.device)
    fields = call.fields(out, cuda_zeros(*call.weight()))
    kernels("_cuda").dequantize_int4(**fields, device=device, stream=stream)


def _refuse_triton(call: _Call, out: Tensor) -> str | None:
    return refuse_triton_weight(call.qweight, call.layout)


def _launch_triton(call: _Call, out: Tensor) -> None:
    from llmkern.triton_kernels.dequantize_int4 import launch

    launch(*call.weight(), out)


BACKENDS = (
    Backend("cuda", _refuse_cuda, _launch_cuda),
    Backend("triton", _refuse_triton, _launch_triton),
    Backend("cpu", _refuse_cpu, _launch_cpu),
    Backend("reference", _backends.never_refuse, _launch_reference),
)


def _fake(*args: Any) -> Tensor:
    call = _Call(*args)
    check_weight("dequantize_int4", *call.weight())
    if call.dtype not in FLOATS:
        raise ValueError(
            f"dequantize_int4: dtype: got {call.dtype}, expected float32, bfloat16 or float16"
        )
    shape = weight_shape(call.scales, call.group_size, call.layout)
    return call.scales.new_empty(shape, dtype=call.dtype)


def _run(*args: Any) -> Tensor:
    out, call = _fake(*args), _Call(*args)
    _backends.choose("dequantize_int4", BACKENDS, call, out).launch(call, out)
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
