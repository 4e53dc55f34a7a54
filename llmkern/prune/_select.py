"""Which weights to keep, given a score for each: exactly as many as asked for, also where scores tie."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.prune._amount import Amount, Pattern

SCOPES = ("layer", "row")


def select(scores: Tensor, amount: Amount, scope: str) -> Tensor:
    """Keep the weights with the largest scores.

    Args:
        scores: float [N, K], no NaN.
        amount: a fraction to remove, or a pattern n:m along K, m dividing K.
        scope: for a fraction: "layer" compares all weights, "row" those of each row, so that all rows
            lose equally many. Not read for a pattern.

    Returns:
        bool [N, K], True where a weight is kept. Of equal scores the last in row-major order stay.
    """
    N, K = scores.shape
    if isinstance(amount, Pattern):
        return _keep_of_groups(scores.reshape(-1, amount.m), amount.n).view(N, K)
    rows = scores if scope == "row" else scores.reshape(1, -1)
    return _keep(rows, round(amount * rows.shape[1])).view(N, K)


def _keep_of_groups(groups: Tensor, n: int) -> Tensor:
    """Of each group [G, m] the n largest: those that fewer than n others beat."""
    kept = torch.empty_like(groups, dtype=torch.bool)
    columns = groups.unbind(1)
    for i, column in enumerate(columns):
        beaten = torch.zeros_like(column, dtype=torch.int8)
        for j, other in enumerate(columns):
            if j != i:
                beaten += other >= column if j > i else other > column
        kept[:, i] = beaten < n
    return kept


def _keep(scores: Tensor, removed: int) -> Tensor:
    """Of each row all but the `removed` smallest; of equal ones the first go."""
    if removed == 0 or scores.numel() == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    bound = scores.kthvalue(removed, dim=1, keepdim=True).values
    kept = scores > bound
    # Where the bound is met more often than it may be removed, some of the ties stay.
    spare = scores.shape[1] - removed - kept.sum(1)
    tied = spare.nonzero()[:, 0]
    if len(tied):
        equal = scores[tied] == bound[tied]
        first = (equal.sum(1) - spare[tied])[:, None]
        kept[tied] |= equal & (equal.cumsum(1) > first)
    return kept
