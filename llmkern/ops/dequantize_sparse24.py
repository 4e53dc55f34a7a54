"""dequantize_sparse24: dense weight from a 2:4 sparse one, of floats or of 4-bit codes.

It is no part of a forward pass, only of the backward pass and of exports: plain torch on every device
and whatever backend is forced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern._dtypes import FLOATS
from llmkern.formats.sparse24 import decompress
from llmkern.ops._library import register
from llmkern.ops._sparse24_weight import (
    canonical_int4_weight,
    canonical_weight,
    check_int4_weight,
    check_weight,
    int4_weight_shape,
    weight_shape,
)
from llmkern.reference.sparse24_w4a16_gemm import dequantize_sparse24 as _reference

SCHEMA = (
    "dequantize_sparse24(Tensor values, Tensor meta, Tensor? scales, Tensor? zeros, int group_size, "
    "str layout, ScalarType dtype) -> Tensor"
)


def _fake(
    values: Tensor,
    meta: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    group_size: int,
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    op = "dequantize_sparse24"
    if scales is None:
        check_weight(op, values, meta, layout)
        shape = weight_shape(values, meta, layout)
    else:
        check_int4_weight(op, values, meta, scales, zeros, group_size, layout)
        shape = int4_weight_shape(scales, group_size, layout)
    if dtype not in FLOATS:
        raise ValueError(f"{op}: dtype: got {dtype}, expected float32, bfloat16 or float16")
    return values.new_empty(shape, dtype=dtype)


def _run(
    values: Tensor,
    meta: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    group_size: int,
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    out = _fake(values, meta, scales, zeros, group_size, layout, dtype)
    if scales is None:
        return out.copy_(decompress(*canonical_weight(values, meta, layout)))
    weight = canonical_int4_weight(values, meta, scales, zeros, group_size, layout)
    return out.copy_(_reference(*weight, group_size, dtype))


_op = register(SCHEMA, _run, _fake)


def dequantize_sparse24(
    values: Tensor,
    meta: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    *,
    group_size: int = 0,
    dtype: torch.dtype = torch.float32,
    layout: str = "canonical",
) -> Tensor:
    """Dense weight, 0 where pruned; where kept the value, or with `scales`, scale * (code - zero).

    Args:
        values: the kept values, or with `scales` the kept codes, in the canonical layout of
            `llmkern.formats.sparse24`, or a backend's repacked one as named by `layout`.
        meta: which columns they are, likewise.
        scales: float32, bfloat16 or float16 [N, K/group_size] for codes (transposed in repacked
            layouts), None for floats.
        zeros: int32 [ceil(N/8), K/group_size] packed zero points, or None for the constant 8.
        group_size: columns of the dense weight per scale, a multiple of 32; of no meaning for floats.
        dtype: of the result.
        layout: "canonical", "cpu" or "cuda".

    Returns:
        [N, K] in `dtype`; a product is formed in float32 and rounded once.

    Raises:
        ValueError: an argument's dtype, shape, device or layout is not as above.
    """
    w: Tensor = _op(values, meta, scales, zeros, group_size, layout, dtype)
    return w
