"""Specification of lut4_gemm and dequantize_lut4.

w[n, k] = scales[n, k // group_size] * codebook[.., codes[n, k]]
y[m, n] = sum_k x[m, k] * w[n, k] + bias[n]
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.formats.int4 import unpack_codes


def dequantize_lut4(
    qweight: Tensor,
    codebook: Tensor,
    scales: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Dense weight [N, K] in `dtype`; arguments in the canonical layout of `formats.lut4`.

    The product of scale and entry is formed in float32 (float64 when `dtype` is) and rounded once.
    """
    N, K = qweight.shape[0], 8 * qweight.shape[1]
    work = torch.float64 if dtype == torch.float64 else torch.float32
    if K == 0:
        return torch.empty(N, 0, dtype=dtype, device=qweight.device)
    codes = unpack_codes(qweight, 4, K).view(N, -1, group_size)
    if codebook.dim() == 1:
        w = codebook[codes.int()]
    else:
        books = codebook.view(N, -1, 16).expand(N, K // group_size, 16)
        w = books.gather(2, codes.long())
    w = w.to(work)
    if scales is not None:
        w = w * scales.to(work)[..., None]
    return w.reshape(N, K).to(dtype)


def lut4_gemm(
    x: Tensor,
    qweight: Tensor,
    codebook: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    """y [M, N] in x.dtype, accumulated in float32, or in float64 for a float64 x."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    w = dequantize_lut4(qweight, codebook, scales, group_size, work)
    # Strided rows would change the order in which some BLAS libraries add.
    y = x.to(work).contiguous() @ w.t()
    if bias is not None:
        y += bias.to(work)
    return y.to(x.dtype)
