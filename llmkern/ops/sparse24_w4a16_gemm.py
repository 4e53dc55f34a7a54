"""sparse24_w4a16_gemm: y = x @ w.T + bias with 4-bit codes inside 2:4 sparsity, 3 bits a weight.

The format of Sparse-Marlin (arXiv 2408.11743, section 5), with a mask that is no function of the codes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkern import _backends
from llmkern._backends import Backend
from llmkern._dtypes import FLOAT_NAMES
from llmkern.formats.sparse24_cuda import is_symmetric
from llmkern.ops import _code_gemm
from llmkern.ops._int4_weight import refuse_triton_weight
from llmkern.ops._library import pointer
from llmkern.ops._sparse24_config import select_config
from llmkern.ops._sparse24_weight import (
    canonical_int4_weight,
    check_int4_weight,
    int4_weight_shape,
    refuse_cuda_layout,
    refuse_cuda_weight,
)
from llmkern.ops.dequantize_sparse24 import dequantize_sparse24
from llmkern.reference.sparse24_w4a16_gemm import sparse24_w4a16_gemm as _reference

SCHEMA = (
    "sparse24_w4a16_gemm(Tensor x, Tensor qvalues, Tensor meta, Tensor scales, Tensor? zeros, "
    "Tensor? bias, int group_size, str layout) -> Tensor"
)


class _Call(NamedTuple):
    x: Tensor
    qvalues: Tensor
    meta: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None
    group_size: int
    layout: str

    def weight(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.qvalues, self.meta, self.scales, self.zeros


def _refuse_cpu(call: _Call, out: Tensor) -> str | None:
    return _code_gemm.refuse_cpu(call, out) or refuse_cuda_layout(call.layout)


def _fields(call: _Call, zeros: int) -> dict[str, Any]:
    return {
        "qvalues": pointer(call.qvalues),
        "meta": pointer(call.meta),
        "scales": pointer(call.scales),
        "zeros": zeros,
        "group_size": call.group_size,
        "scales_dtype": FLOAT_NAMES[call.scales.dtype],
        "layout": call.layout,
    }


def _launch_cpu(call: _Call, out: Tensor) -> None:
    fields = _fields(call, pointer(call.zeros))
    _code_gemm.launch_cpu("sparse24_w4a16_gemm", fields, call, out)


def _launch_reference(call: _Call, out: Tensor) -> None:
    weight = canonical_int4_weight(*call.weight(), call.group_size, call.layout)
    out.copy_(_reference(call.x, *weight, call.bias, call.group_size))


def _refuse_cuda(call: _Call, out: Tensor) -> str | None:
    return refuse_cuda_weight(call.x, call.qvalues, call.layout)


def _launch_cuda(call: _Call, out: Tensor) -> None:
    symmetric = is_symmetric(call.qvalues, call.scales, call.group_size)
    fields = _fields(call, 0 if symmetric else pointer(call.qvalues))
    _code_gemm.launch_cuda("sparse24_w4a16_gemm", fields, call, out, select_config)


def _refuse_triton(call: _Call, out: Tensor) -> str | None:
    return refuse_triton_weight(call.qvalues, call.layout)


def _launch_triton(call: _Call, out: Tensor) -> None:
    from llmkern.triton_kernels.sparse24_w4a16_gemm import launch

    launch(*call, out)


BACKENDS = (
    Backend("cuda", _refuse_cuda, _launch_cuda),
    Backend("triton", _refuse_triton, _launch_triton),
    Backend("cpu", _refuse_cpu, _launch_cpu),
    Backend("reference", _backends.never_refuse, _launch_reference),
)


def _shape(call: _Call) -> tuple[int, int]:
    op = "sparse24_w4a16_gemm"
    check_int4_weight(op, *call.weight(), call.group_size, call.layout)
    shape = int4_weight_shape(call.scales, call.group_size, call.layout)
    _code_gemm.check_product(op, call.x, call.bias, shape, call.scales.device)
    return shape


def _dense(call: _Call, dtype: torch.dtype) -> Tensor:
    return dequantize_sparse24(
        *call.weight(), group_size=call.group_size, dtype=dtype, layout=call.layout
    )


_op = _code_gemm.register_product(SCHEMA, _Call, BACKENDS, _shape, _dense)


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
    return _code_gemm.multiply_rows(_op, x, qvalues, meta, scales, zeros, bias, group_size, layout)
