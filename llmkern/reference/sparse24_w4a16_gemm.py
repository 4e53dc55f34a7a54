"""Specification of sparse24_w4a16_gemm.

w[n, k] = scales[n, k // group_size] * (code[n, k] - zeros[n, k // group_size]) where kept, else 0
y[m, n] = sum_k x[m, k] * w[n, k] + bias[n]
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.formats.int4 import unpack_zeros
from llmkern.formats.sparse24 import decompress_codes


def dequantize_sparse24(
    qvalues: Tensor,
    meta: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Dense weight [N, K] in `dtype`; arguments in the canonical layout of `formats.sparse24`.

    The product of scale and code is formed in float32 (float64 when `dtype` is) and rounded once.
    """
    N, groups = scales.shape
    work = torch.float64 if dtype == torch.float64 else torch.float32
    if groups == 0:
        return torch.empty(N, 0, dtype=dtype, device=qvalues.device)
    points = None if zeros is None else unpack_zeros(zeros, 4, N)
    # Pruned codes come back as the zero point, which is the number 0.
    codes, _ = decompress_codes(qvalues, meta, points)
    steps = codes.to(work).view(N, groups, group_size)
    steps = steps - (8 if points is None else points.to(work)[..., None])
    return (scales.to(work)[..., None] * steps).reshape(N, -1).to(dtype)


def sparse24_w4a16_gemm(
    x: Tensor,
    qvalues: Tensor,
    meta: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    """y [M, N] in x.dtype, accumulated in float32, or in float64 for a float64 x."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    w = dequantize_sparse24(qvalues, meta, scales, zeros, group_size, work)
    y = x.to(work) @ w.t()
    if bias is not None:
        y += bias.to(work)
    return y.to(x.dtype)
