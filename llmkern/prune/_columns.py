"""Removing columns of a weight so that its outputs change the least.

With S the columns that stay, the best weight on them is the least-squares one, ŵ_S = w H[:, S] H_SS⁻¹.
Which columns stay is given, or chosen by `llmkern.ops.obs_prune_columns`. Where entries of w are to
stay zero, as an earlier pruning of single weights left them: row by row the same problem on the entries
that are left, solved for all rows together by conjugate gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.models import Units
from llmkern.ops import factorize_hessian, obs_prune_columns

_CG_STEPS = 100
_CG_TOLERANCE = 1e-4


def choose_units(
    weight: Tensor, H: Tensor, units: Units, remove: int, damp: float
) -> tuple[Tensor, Tensor]:
    """Remove `remove` units one after the other, each time that of the least loss.

    Args:
        weight: [N, K], of the linear that reads the units.
        H: float32 [K, K], symmetric.
        units: whose columns they are.
        remove: how many go.
        damp: fraction of the mean of H's diagonal that is added to it.

    Returns:
        The units that stay, int64 ascending, and the loss of each removal in its turn, float32.
    """
    size = units.columns.shape[1]
    result = obs_prune_columns(weight.float(), H, remove, group_size=size, damp=damp)
    kept = torch.zeros(weight.shape[1], dtype=torch.bool)
    kept[result.kept.cpu()] = True
    return kept[units.columns[:, 0]].nonzero().flatten(), result.losses.float().cpu()


def adjusted(
    weight: Tensor, H: Tensor, columns: Tensor, damp: float, held: Tensor | None = None
) -> tuple[Tensor, bool]:
    """The weight on the columns that stay.

    Args:
        weight: [N, K].
        H: float32 [K, K], symmetric.
        columns: int64, those that stay.
        damp: fraction of the mean of H's diagonal that is added to it.
        held: bool [N, K], False where the weight is zero and is to stay zero.

    Returns:
        float32 [N, len(columns)], and whether H could be factored; the weight is as it was where not.
    """
    w = weight.float()
    columns = columns.to(H.device)
    inner = H[columns][:, columns]
    factor = factorize_hessian(inner, damp=damp)
    if not factor.factored:
        return w[:, columns], False
    ridge = factor.damp * inner.diagonal().mean()
    right = w @ H[:, columns] + ridge * w[:, columns]
    root = factor.U * factor.d  # inner + ridge = root rootᵀ, root upper triangular
    half = torch.linalg.solve_triangular(root.t(), right, upper=False, left=False)
    # Dead inputs get a row of zeros in `right`; what reads them has no effect and stays as it was.
    solved = torch.linalg.solve_triangular(root, half, upper=True, left=False)
    solved = torch.where(factor.dead, w[:, columns], solved)
    if held is None:
        return solved, True
    return _on_support(solved, right, inner, ridge, held[:, columns]), True


def _on_support(start: Tensor, right: Tensor, H: Tensor, ridge: Tensor, held: Tensor) -> Tensor:
    """Rows x with x (H + ridge) = right on the entries `held` and zero elsewhere, from `start`."""
    diagonal = (H.diagonal() + ridge).clamp(min=torch.finfo(torch.float32).tiny)
    x = torch.where(held, start, 0.0)
    residual = torch.where(held, right - x @ H - ridge * x, 0.0)
    scale = torch.where(held, right, 0.0).square().sum(1).clamp(min=torch.finfo(x.dtype).tiny)
    step = residual / diagonal
    slope = (residual * step).sum(1)
    for _ in range(_CG_STEPS):
        if bool((residual.square().sum(1) <= _CG_TOLERANCE**2 * scale).all()):
            break
        image = torch.where(held, step @ H + ridge * step, 0.0)
        curvature = (step * image).sum(1)
        length = torch.where(curvature > 0, slope / curvature, 0.0)[:, None]
        x = x + length * step
        residual = residual - length * image
        scaled = residual / diagonal
        new_slope = (residual * scaled).sum(1)
        step = scaled + torch.where(slope > 0, new_slope / slope, 0.0)[:, None] * step
        slope = new_slope
    return x
