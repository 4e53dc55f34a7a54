"""Specification of obs_prune_columns: optimal brain surgeon on whole columns, greedily.

Removing the columns S of w [N, K] and updating what remains costs, at the least,

    tr(w_S ([H⁻¹]_SS)⁻¹ w_Sᵀ)     with   w -= w_S ([H⁻¹]_SS)⁻¹ [H⁻¹]_S,:

(Hassibi & Stork 1993, on blocks; for the structures of a language model Kurtić et al. 2023, ZipLM, arXiv
2302.04089). The greedy loop removes the cheapest group, downdates w and H⁻¹, and goes on.
"""

from __future__ import annotations

import torch
from torch import Tensor


def obs_prune_columns(
    w: Tensor, H: Tensor, groups: Tensor, count: int, keep: Tensor | None = None
) -> tuple[Tensor, list[int], list[float]]:
    """Remove `count` groups of columns one by one, in w's dtype.

    Args:
        w: float [N, K].
        H: float [K, K], symmetric positive definite.
        groups: int64 [K], group of each column, 0 .. max.
        count: groups to remove.
        keep: bool [K]; a group with a True column stays.

    Returns:
        w_hat [N, K], the removed groups in order, and the loss that each added.
    """
    w, inverse = w.clone(), torch.linalg.inv(H)
    candidates = [
        g for g in range(int(groups.max()) + 1) if keep is None or not bool(keep[groups == g].any())
    ]
    removed, losses = [], []
    for _ in range(count):
        costs = torch.stack([_cost(w, inverse, groups == g) for g in candidates])
        g = candidates.pop(int(costs.argmin()))
        columns = groups == g
        step = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])
        w = w - w[:, columns] @ step
        inverse = inverse - inverse[:, columns] @ step
        w[:, columns] = 0
        inverse[columns] = 0
        inverse[:, columns] = 0
        removed.append(g)
        losses.append(float(costs.min()))
    return w, removed, losses


def _cost(w: Tensor, inverse: Tensor, columns: Tensor) -> Tensor:
    block = inverse[columns][:, columns]
    solved: Tensor = torch.linalg.solve(block, w[:, columns].t())
    return (solved * w[:, columns].t()).sum()


def least_squares(w: Tensor, H: Tensor, kept: Tensor) -> Tensor:
    """The w_hat with (w - w_hat) H (w - w_hat)ᵀ at its least and zeros outside `kept`, bool [K]."""
    w_hat = torch.zeros_like(w)
    pushed = w[:, ~kept] @ H[~kept][:, kept]
    w_hat[:, kept] = w[:, kept] + torch.linalg.solve(H[kept][:, kept], pushed.t()).t()
    return w_hat
