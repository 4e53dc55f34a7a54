"""OWL: blocks with more outlying weights are pruned less (Yin et al. 2023, arXiv 2310.05175).

A weight is an outlier if its Wanda score |w_nk| |x_k|₂ exceeds a multiple of the block's mean score.
With D_b the fraction of outliers in block b and D their mean, weighted by the blocks' sizes,

    s_b = s + λ (D - D_b) / max_b |D - D_b|

so that the sparsities stay within s ± λ and their weighted mean is s. The published code spreads the
same range around the plain mean, where blocks of unequal size would change the total.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmkern.calibrate import ActivationNormStatistic, Block, walk
from llmkern.models.linears import dense_weight
from llmkern.prune._method import PruneJob

THRESHOLD = 5.0
LAMBDA = 0.08


@dataclass(frozen=True)
class _Outliers:
    """Of one block: how many weights are to be pruned at its sparsity, how many of them outliers."""

    weights: int
    outliers: int

    @property
    def fraction(self) -> float:
        return self.outliers / self.weights


def allocate(
    job: PruneJob, layers: frozenset[str], sparsity: float, threshold: float, spread: float
) -> dict[str, float]:
    """Sparsity of each layer, by the outliers of its block; the model is only read.

    Args:
        job: gives the model and the calibration windows; the outlier fractions go into its report.
        layers: full names of the linears that share the sparsity.
        sparsity: s, the fraction of all their weights to remove.
        threshold: how many times the mean score a weight has to exceed.
        spread: λ.

    Returns:
        Sparsity by full name, the same for all layers of a block.

    Raises:
        ValueError: s ± λ leaves [0, 1); no layer; NaN or Inf in the inputs (the layer is named).
    """
    if sparsity < spread or sparsity + spread >= 1:
        raise ValueError(
            f"owl_lambda: got {spread} with sparsity {sparsity}, expected sparsity ± owl_lambda inside "
            "[0, 1)"
        )
    if not layers:
        raise ValueError(
            "allocation: got 'owl' with a rule for every layer, expected some without one"
        )
    windows = job.windows()
    found: dict[str, _Outliers] = {}
    members: dict[str, str] = {}

    def count(block: Block) -> None:
        groups = [
            group
            for names in block.groups()
            if (group := tuple(n for n in names if f"{block.name}.{n}" in layers))
        ]

        def empty(group: tuple[str, ...]) -> ActivationNormStatistic:
            weight = dense_weight(block.module.get_submodule(group[0]))
            return ActivationNormStatistic(
                weight.shape[1], tokens=windows.numel(), device=weight.device
            )

        if groups:
            found[block.name] = _outliers(block, groups, block.collect(groups, empty), threshold)
            members.update({f"{block.name}.{n}": block.name for group in groups for n in group})

    walk(job.model, windows, count, batch_size=job.data.batch_size, compute=job.data.compute_dtype)
    job.report.outliers = {name: block.fraction for name, block in found.items()}
    by_block = _spread(found, sparsity, spread)
    return {name: by_block[block] for name, block in members.items()}


def _outliers(
    block: Block,
    groups: list[tuple[str, ...]],
    statistics: list[ActivationNormStatistic],
    threshold: float,
) -> _Outliers:
    """Count, without holding more than one layer's scores."""

    def scores(name: str, statistic: ActivationNormStatistic) -> Tensor:
        weight = dense_weight(block.module.get_submodule(name)).float().abs()
        if statistic.rows == 0:
            return torch.zeros_like(weight)  # an expert that no token reached
        try:
            return weight.mul_(statistic.mean_square().sqrt())
        except ValueError as error:
            raise ValueError(f"{block.name}.{name}: {error}") from error

    pairs = [(n, s) for group, s in zip(groups, statistics, strict=True) for n in group]
    total, count = 0.0, 0
    for pair in pairs:
        score = scores(*pair)
        total += float(score.sum(dtype=torch.float64))
        count += score.numel()
    bound = threshold * total / count
    return _Outliers(count, sum(int((scores(*pair) > bound).sum()) for pair in pairs))


def _spread(blocks: Mapping[str, _Outliers], sparsity: float, spread: float) -> dict[str, float]:
    total = sum(block.weights for block in blocks.values())
    mean = sum(block.outliers for block in blocks.values()) / total
    gaps = {name: mean - block.fraction for name, block in blocks.items()}
    widest = max(abs(gap) for gap in gaps.values()) or 1.0
    return {name: sparsity + spread * gap / widest for name, gap in gaps.items()}
