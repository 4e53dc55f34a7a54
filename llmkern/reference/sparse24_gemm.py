"""Specification of sparse24_gemm.

w = decompress(values, meta), 0 where pruned
y[m, n] = sum_k x[m, k] * w[n, k] + bias[n]
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.formats.sparse24 import decompress


def sparse24_gemm(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    """y [M, N] in x.dtype, accumulated in float32, or in float64 for a float64 x."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(work) @ decompress(values, meta).to(work).t()
    if bias is not None:
        y += bias.to(work)
    return y.to(x.dtype)
