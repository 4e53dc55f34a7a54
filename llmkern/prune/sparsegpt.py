"""SparseGPT: each removed weight's error is pushed onto the weights of its row that are still to come.

Frantar & Alistarh 2023, arXiv 2301.00774. The column loop is `llmkern.ops.obs_prune`; layers that share
an input share one factored Hessian.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from llmkern.calibrate import HessianStatistic
from llmkern.calibrate.statistics import relative_loss
from llmkern.drive import Layer
from llmkern.ops import obs_prune
from llmkern.prune._amount import Amount, Pattern
from llmkern.prune._layers import LayerOptions, SingleWeights
from llmkern.prune._method import PruneMethod
from llmkern.prune._report import PrunedWeight
from llmkern.prune.magnitude import magnitude


@dataclass(frozen=True)
class SparseGptOptions(LayerOptions):
    """Options of `sparsegpt`; those of `LayerOptions`, scope "layer" by default (per block of 128
    columns, as published), and

    Attributes:
        damp: fraction of the mean of the Hessian's diagonal that is added to it, in [0, 1).
        act_order: visit the columns with the largest inputs first, with a pattern in groups of m.
        true_sequential: inside a block, let each linear see the outputs of the pruned ones before it;
            otherwise all of a block's statistics are taken in one pass, before any is pruned.
    """

    damp: float = 0.01
    act_order: bool = False
    true_sequential: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damp < 1:
            raise ValueError(f"damp: got {self.damp}, expected a fraction in [0, 1)")


def sparsegpt(
    weight: Tensor, amount: Amount, statistic: HessianStatistic, options: SparseGptOptions
) -> PrunedWeight:
    """Prune weight [N, K] against the Hessian of its inputs, and update what remains.

    Returns:
        The weight; its `factored` is False if the Hessian could not be factored at any damping, which
        leaves Wanda's score without an update, or no input ever came (an expert without tokens), which
        leaves magnitude.

    Raises:
        ValueError: NaN or Inf in the statistic, a statistic of another width than K.
    """
    scope = options.scope or "layer"
    if statistic.rows == 0:
        # An empty Hessian would declare every column dead, and the weight zero.
        plain = magnitude(weight, amount, None, LayerOptions(scope))
        return dataclasses.replace(plain, factored=False)
    pattern = (amount.n, amount.m) if isinstance(amount, Pattern) else None
    factor = statistic.factor(
        damp=options.damp, act_order=options.act_order, unit=pattern[1] if pattern else 1
    )
    result = obs_prune(
        weight,
        factor,
        sparsity=None if isinstance(amount, Pattern) else amount,
        pattern=pattern,
        scope=scope,
    )
    return PrunedWeight(
        weight=result.w_hat,
        mask=result.mask,
        loss=float(result.loss.sum(dtype=torch.float64)),
        relative_loss=relative_loss(weight, result.loss, factor),
        damp=result.damp,
        factored=result.factored,
    )


def _layer(layer: Layer, options: SparseGptOptions) -> PrunedWeight:
    return sparsegpt(layer.weight, layer.wanted, layer.statistic, options)


METHOD = PruneMethod(
    name="sparsegpt",
    about="single weights: each removed weight's error is pushed onto the ones that stay",
    options=SparseGptOptions,
    amounts=("sparsity", "pattern"),
    work=SingleWeights(_layer, HessianStatistic),
    compared={
        "sparsegpt 2:4": {"pattern": "2:4"},
        "sparsegpt 50 %": {"sparsity": 0.5},
    },
)
