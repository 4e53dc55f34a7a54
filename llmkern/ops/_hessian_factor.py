"""Factor of a damped Hessian for the OBS column loops: one Cholesky, no inverse.

H = (U diag(d)) (U diag(d))ᵀ with U unit upper triangular: the lower Cholesky factor of H with both
axes reversed, reversed back. The classical loops need chol(H⁻¹) instead, which costs two
factorizations and an inverse, four times the work, and is worse conditioned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A failed factorization is tried again with more damping, then with a floor under the diagonal, then
# in float64; only then is the Hessian given up.
_DAMP_TRIES = 4
_DAMP_STEP = 0.01
_DIAGONAL_FLOOR = 1e-4


@dataclass(frozen=True)
class HessianFactor:
    """H = (U diag(d)) (U diag(d))ᵀ over the columns taken in `order`.

    Attributes:
        U: float32 [K, K], unit upper triangular.
        d: float32 [K], positive.
        order: int64 [K], the original column at each position, or None for the natural order.
        dead: bool [K], original columns whose input was always zero.
        damp: the damping that made it factor, as a fraction of the mean of H's diagonal.
        factored: False if no damping helped; U and d then hold only H's diagonal, which makes the
            column loop round to nearest.
    """

    U: Tensor
    d: Tensor
    order: Tensor | None
    dead: Tensor
    damp: float
    factored: bool


def factorize_hessian(H: Tensor, *, damp: float = 0.01, act_order: bool = False) -> HessianFactor:
    """Factor H + damp * mean(diag H) * I.

    Args:
        H: float32 or float64 [K, K]; the lower triangle is read (as `hessian_update` leaves it).
        damp: fraction of the mean of the diagonal that is added to it, in [0, 1).
        act_order: take the columns in descending order of the diagonal (GPTQ's act-order).

    Returns:
        The factor; its `factored` says whether H could be factored at all.

    Raises:
        ValueError: H is not a square float matrix, holds NaN or Inf, has a negative diagonal entry, or
            damp is out of range.
    """
    _check(H, damp)
    dead = H.diagonal() == 0
    mean = float(H.diagonal().mean())
    scale = mean if mean > 0 else 1.0
    diagonal = torch.where(dead, torch.full_like(H.diagonal(), scale), H.diagonal())
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else None
    for dtype, extra, floor in _ladder(damp):
        L = _reversed_lower(H, diagonal + extra * scale, order, dtype, floor * scale)
        L, info = torch.linalg.cholesky_ex(L)
        if int(info) == 0:
            d = L.diagonal().flip(0)
            if bool(torch.isfinite(d).all()) and bool((d > 0).all()):
                return _finish(L, order, dead, extra)
    d = (diagonal if order is None else diagonal[order]).sqrt().float()
    eye = torch.eye(len(d), dtype=torch.float32, device=H.device)
    return HessianFactor(eye, d, order, dead, damp, factored=False)


def _check(H: Tensor, damp: float) -> None:
    if H.dim() != 2 or H.shape[0] != H.shape[1] or H.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"H: got {H.dtype} {list(H.shape)}, expected a square float32 or float64 matrix"
        )
    if not 0 <= damp < 1:
        raise ValueError(f"damp: got {damp}, expected a fraction in [0, 1)")
    # A NaN or Inf anywhere in the lower triangle shows in its sum; no copy of H is made for the test.
    if not bool(torch.isfinite(H.diagonal()).all()) or not bool(torch.isfinite(H.tril().sum())):
        raise ValueError("H: got NaN or Inf, expected finite numbers")
    if bool((H.diagonal() < 0).any()):
        raise ValueError("H: got a negative diagonal entry, expected 2/n XᵀX")


def _ladder(damp: float) -> list[tuple[torch.dtype, float, float]]:
    """(dtype, damping, diagonal floor) of each try, the gentlest first."""
    more = [damp + _DAMP_STEP * (4**i - 1) for i in range(_DAMP_TRIES)]
    tries = [(torch.float32, extra, 0.0) for extra in more]
    tries.append((torch.float32, more[-1], _DIAGONAL_FLOOR))
    tries.append((torch.float64, more[-1], _DIAGONAL_FLOOR))
    return tries


def _reversed_lower(
    H: Tensor, diagonal: Tensor, order: Tensor | None, dtype: torch.dtype, floor: float
) -> Tensor:
    """Damped H with its columns in reversed `order`, its lower triangle filled; a new matrix."""
    if order is None:
        # Reversing turns the lower triangle, the one that is filled, into the upper one.
        out = H.to(dtype).flip(0, 1).t()
        diagonal = diagonal.flip(0)
    else:
        full = H.to(dtype).tril()
        full = full + full.tril(-1).t()
        out = full[order.flip(0)][:, order.flip(0)]
        diagonal = diagonal[order].flip(0)
    out.diagonal().copy_(diagonal.to(dtype).clamp(min=floor))
    return out


def _finish(L: Tensor, order: Tensor | None, dead: Tensor, damp: float) -> HessianFactor:
    R = L.flip(0, 1)
    d = R.diagonal().clone()
    return HessianFactor(
        R.div_(d).float().contiguous(), d.float().contiguous(), order, dead, damp, factored=True
    )
