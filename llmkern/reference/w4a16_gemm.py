"""Specification of w4a16_gemm and dequantize_int4.

w[n, k] = scales[n, k // group_size] * (u[n, k] - zeros[n, k // group_size])
y[m, n] = sum_k x[m, k] * w[n, k] + bias[n]
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.formats.int4 import unpack_codes, unpack_zeros


def dequantize_int4(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Dense weight [N, K] in `dtype`; arguments in the canonical layout of `formats.int4`.

    The product of scale and code is formed in float32 (float64 when `dtype` is) and rounded once.
    """
    N, groups = scales.shape
    work = torch.float64 if dtype == torch.float64 else torch.float32
    codes = unpack_codes(qweight, 4, groups * group_size).to(work).view(N, groups, group_size)
    centre = 8 if zeros is None else unpack_zeros(zeros, 4, N).to(work)[..., None]
    return (scales.to(work)[..., None] * (codes - centre)).reshape(N, -1).to(dtype)


def round_rows(x: Tensor) -> Tensor:
    """x [M, K] rounded to 8 bits per row in float32: q * max|x| / 127, q the integers -127 .. 127."""
    rows = x.float()
    top = rows.abs().amax(1, keepdim=True) if x.shape[1] else rows.new_zeros(len(x), 1)
    factor = 127 / top
    # A row too small for a finite factor counts as 0.
    factor = torch.where(torch.isinf(factor), torch.zeros_like(factor), factor)
    return ((rows * factor).round() * (top / 127)).to(
        x.dtype if x.dtype == torch.float64 else rows.dtype
    )


def w4a16_gemm(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    activation: str = "float",
) -> Tensor:
    """y [M, N] in x.dtype, accumulated in float32, or in float64 for a float64 x."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    w = dequantize_int4(qweight, scales, zeros, group_size, work)
    rows = round_rows(x) if activation == "int8" else x
    # Strided rows would change the order in which some BLAS libraries add.
    y = rows.to(work).contiguous() @ w.t()
    if bias is not None:
        y += bias.to(work)
    return y.to(x.dtype)
