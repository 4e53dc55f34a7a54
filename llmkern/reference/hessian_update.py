"""Specification of hessian_update: H += alpha * XᵀX, lower triangle only."""

from __future__ import annotations

from torch import Tensor


def hessian_update(H: Tensor, x: Tensor, alpha: float) -> None:
    """Add alpha * xᵀx to the lower triangle of H [K, K], in H's dtype; the rest is left alone.

    x [T, K] is converted to H's dtype, which holds every bf16 and fp16 product exactly.
    """
    x = x.to(H.dtype)
    H += (x.t() @ x).mul_(alpha).tril_()
