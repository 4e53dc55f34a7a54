"""Factor of a damped Hessian for the OBS column loops: one Cholesky, no inverse.

H = (U diag(d)) (U diag(d))ᵀ with U unit upper triangular: the lower Cholesky factor of H with both
axes reversed, reversed back. The classical loops need chol(H⁻¹) instead, which costs two
factorizations and an inverse, four times the work, and is worse conditioned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmkern import _backends
from llmkern.ops._library import kernels, pointer

# A failed factorization is tried again with more damping, then with a floor under the diagonal, then
# in float64; only then is the Hessian given up.
_DAMP_TRIES = 4
_DAMP_STEP = 0.01
_DIAGONAL_FLOOR = 1e-4
_NOT_FINITE = "H: got NaN or Inf, expected finite numbers"


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


def factorize_hessian(
    H: Tensor, *, damp: float = 0.01, act_order: bool = False, unit: int = 1
) -> HessianFactor:
    """Factor H + damp * mean(diag H) * I.

    Args:
        H: float32 or float64 [K, K]; the lower triangle is read (as `hessian_update` leaves it).
        damp: fraction of the mean of the diagonal that is added to it, in [0, 1).
        act_order: take the columns in descending order of the diagonal (GPTQ's act-order).
        unit: with act_order, take whole runs of `unit` neighbouring columns, by their sum.

    Returns:
        The factor; its `factored` says whether H could be factored at all.

    Raises:
        ValueError: H is not a square float matrix, holds NaN or Inf, has a negative diagonal entry,
            damp is out of range, or unit does not divide K.
    """
    _check(H, damp, unit)
    dead = H.diagonal() == 0
    mean = float(H.diagonal().mean())
    scale = mean if mean > 0 else 1.0
    diagonal = torch.where(dead, torch.full_like(H.diagonal(), scale), H.diagonal())
    order = _order(diagonal, unit) if act_order else None
    for dtype, extra, floor in _ladder(damp):
        damped = (diagonal + extra * scale).clamp(min=floor * scale)
        factor = _factor(H, damped, order, dtype)
        if factor is not None:
            return HessianFactor(*factor, order, dead, extra, factored=True)
    # A NaN or Inf beside the diagonal makes every try fail, so only a failure pays for looking.
    if not _lower_triangle_is_finite(H):
        raise ValueError(_NOT_FINITE)
    d = (diagonal if order is None else diagonal[order]).sqrt().float()
    eye = torch.eye(len(d), dtype=torch.float32, device=H.device)
    return HessianFactor(eye, d, order, dead, damp, factored=False)


def _order(diagonal: Tensor, unit: int) -> Tensor:
    """Columns in runs of `unit`, the runs in descending order of their sum."""
    runs = torch.argsort(diagonal.view(-1, unit).sum(1), descending=True, stable=True)
    return (runs[:, None] * unit + torch.arange(unit, device=runs.device)).view(-1)


def _check(H: Tensor, damp: float, unit: int) -> None:
    if H.dim() != 2 or H.shape[0] != H.shape[1] or H.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"H: got {H.dtype} {list(H.shape)}, expected a square float32 or float64 matrix"
        )
    if not 0 <= damp < 1:
        raise ValueError(f"damp: got {damp}, expected a fraction in [0, 1)")
    if unit < 1 or len(H) % unit:
        raise ValueError(f"unit: got {unit}, expected a divisor of K = {len(H)}")
    if not bool(torch.isfinite(H.diagonal()).all()):
        raise ValueError(_NOT_FINITE)
    if bool((H.diagonal() < 0).any()):
        raise ValueError("H: got a negative diagonal entry, expected 2/n XᵀX")


def _ladder(damp: float) -> list[tuple[torch.dtype, float, float]]:
    """(dtype, damping, diagonal floor) of each try, the gentlest first."""
    more = [damp + _DAMP_STEP * (4**i - 1) for i in range(_DAMP_TRIES)]
    tries = [(torch.float32, extra, 0.0) for extra in more]
    tries.append((torch.float32, more[-1], _DIAGONAL_FLOOR))
    tries.append((torch.float64, more[-1], _DIAGONAL_FLOOR))
    return tries


def _lower_triangle_is_finite(H: Tensor) -> bool:
    chunk = 256
    return all(
        bool(torch.isfinite(H[row : row + chunk].tril(row)).all())
        for row in range(0, len(H), chunk)
    )


def _factor(
    H: Tensor, diagonal: Tensor, order: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """(U, d) of H with its diagonal replaced, or None if that is not positive definite."""
    on_cpu = (_backends.forced_backend() or "cpu") == "cpu" and dtype == torch.float32
    if on_cpu and _backends.refuse_cpu(H.device.type) is None:
        return _factor_cpu(H, diagonal, order)
    return _factor_torch(H, diagonal, order, dtype)


def _factor_cpu(H: Tensor, diagonal: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """The compiled kernel; besides U it needs half a K x K matrix."""
    H, diagonal = H.float().contiguous(), diagonal.float().contiguous()
    U, d = torch.empty_like(H), torch.empty_like(diagonal)
    factored = kernels("_cpu").hessian_factor(
        H=pointer(H),
        diagonal=pointer(diagonal),
        order=pointer(order),
        U=pointer(U),
        d=pointer(d),
        K=len(H),
    )
    return (U, d) if factored else None


def _factor_torch(
    H: Tensor, diagonal: Tensor, order: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """torch's Cholesky of H with both axes reversed, reversed back; two K x K matrices besides H."""
    if order is None:
        # Reversing turns the lower triangle, the one that is filled, into the upper one.
        L = H.to(dtype).flip(0, 1).t()
        diagonal = diagonal.flip(0)
    else:
        L = H.to(dtype).tril(-1)
        L = L + L.t()
        L = L[order.flip(0)]
        L = L[:, order.flip(0)]
        diagonal = diagonal[order].flip(0)
    L.diagonal().copy_(diagonal.to(dtype))
    L, info = torch.linalg.cholesky_ex(L)
    d = L.diagonal().flip(0)
    if int(info) or not bool(torch.isfinite(d).all()) or not bool((d > 0).all()):
        return None
    return L.flip(0, 1).div_(d).float().contiguous(), d.float().contiguous()
