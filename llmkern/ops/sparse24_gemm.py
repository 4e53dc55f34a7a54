"""sparse24_gemm: y = x @ w.T + bias with a 2:4 sparse w, half of whose columns are stored.

2:4 sparsity as NVIDIA's sparse tensor cores have it (arXiv 2104.08378). A small M is bound by reading
the weight, which is 0.5625 of a dense 16-bit one; a large M by arithmetic, of which half remains.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkern import _backends
from llmkern._backends import Backend
from llmkern._dtypes import FLOATS, dtype_name
from llmkern.ops import _code_gemm
from llmkern.ops._int4_weight import refuse_triton_weight
from llmkern.ops._library import expect, pointer
from llmkern.ops._sparse24_config import select_config
from llmkern.ops._sparse24_weight import (
    canonical_weight,
    check_weight,
    refuse_cuda_layout,
    refuse_cuda_weight,
    weight_shape,
)
from llmkern.ops.dequantize_sparse24 import dequantize_sparse24
from llmkern.reference.sparse24_gemm import sparse24_gemm as _reference

SCHEMA = "sparse24_gemm(Tensor x, Tensor values, Tensor meta, Tensor? bias, str layout) -> Tensor"


class _Call(NamedTuple):
    x: Tensor
    values: Tensor
    meta: Tensor
    bias: Tensor | None
    layout: str

    def weight(self) -> dict[str, Any]:
        """The weight as both compiled kernels take it."""
        values, meta = pointer(self.values), pointer(self.meta)
        return {"values": values, "meta": meta, "layout": self.layout}


def _refuse_cpu(call: _Call, out: Tensor) -> str | None:
    return _code_gemm.refuse_cpu(call, out) or refuse_cuda_layout(call.layout)


def _launch_cpu(call: _Call, out: Tensor) -> None:
    _code_gemm.launch_cpu("sparse24_gemm", call.weight(), call, out)


def _launch_reference(call: _Call, out: Tensor) -> None:
    weight = canonical_weight(call.values, call.meta, call.layout)
    out.copy_(_reference(call.x, *weight, call.bias))


def _refuse_cuda(call: _Call, out: Tensor) -> str | None:
    return refuse_cuda_weight(call.x, call.values, call.layout)


def _launch_cuda(call: _Call, out: Tensor) -> None:
    _code_gemm.launch_cuda("sparse24_gemm", call.weight(), call, out, select_config)


def _refuse_triton(call: _Call, out: Tensor) -> str | None:
    return refuse_triton_weight(call.values, call.layout)


def _launch_triton(call: _Call, out: Tensor) -> None:
    from llmkern.triton_kernels.sparse24_gemm import launch

    launch(*call, out)


BACKENDS = (
    Backend("cuda", _refuse_cuda, _launch_cuda),
    Backend("triton", _refuse_triton, _launch_triton),
    Backend("cpu", _refuse_cpu, _launch_cpu),
    Backend("reference", _backends.never_refuse, _launch_reference),
)


def _shape(call: _Call) -> tuple[int, int]:
    op, x, values = "sparse24_gemm", call.x, call.values
    check_weight(op, values, call.meta, call.layout)
    shape = weight_shape(values, call.meta, call.layout)
    if x.dtype in FLOATS and x.dtype != values.dtype:
        wanted = f"the dtype of values, {dtype_name(values.dtype)}"
        expect(False, op, "x", x, wanted)
    _code_gemm.check_product(op, x, call.bias, shape, values.device)
    return shape


def _dense(call: _Call, dtype: torch.dtype) -> Tensor:
    return dequantize_sparse24(call.values, call.meta, dtype=dtype, layout=call.layout)


_op = _code_gemm.register_product(SCHEMA, _Call, BACKENDS, _shape, _dense)


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
    return _code_gemm.multiply_rows(_op, x, values, meta, bias, layout)
