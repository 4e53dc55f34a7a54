"""Specification of hessian_update: H += alpha * XᵀX, lower triangle only."""

from __future__ import annotations

from torch import Tensor


def hessian_update(H: Tensor, x: Tensor, alpha: float, offsets: Tensor | None = None) -> None:
    """Add alpha * xᵀx to the lower triangle of H, in H's dtype; the rest is left alone.

    H [K, K] and x [T, K]; or H [E, K, K] with x [E, T, K], or with x [T, K] and offsets [E + 1]:
    expert e has rows offsets[e]..offsets[e + 1] - 1. x is converted to H's dtype, which holds every
    bf16 and fp16 product exactly.
    """
    for part, rows in experts(H, x, offsets):
        rows = rows.to(H.dtype)
        part += (rows.t() @ rows).mul_(alpha).tril_()


def experts(H: Tensor, x: Tensor, offsets: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """H [K, K] of each expert with its rows of x."""
    if H.dim() == 2:
        return [(H, x)]
    if offsets is None:
        return list(zip(H, x, strict=True))
    bounds = offsets.tolist()
    return [(part, x[begin:end]) for part, begin, end in zip(H, bounds, bounds[1:], strict=False)]
