"""Wanda: a weight's score is its absolute value times the norm of its input feature.

    score_nk = |w_nk| * |x_k|₂

compared within each output row (Sun et al. 2023, arXiv 2306.11695). The squared scores are the
diagonal of the layer's squared output error, so this is SparseGPT without the update of what remains.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from llmkern.calibrate import ActivationNormStatistic
from llmkern.drive import Layer
from llmkern.prune._amount import Amount
from llmkern.prune._layers import LayerOptions, SingleWeights
from llmkern.prune._method import PruneMethod
from llmkern.prune._report import PrunedWeight
from llmkern.prune._select import select
from llmkern.prune.magnitude import magnitude


@dataclass(frozen=True)
class WandaOptions(LayerOptions):
    """Options of `wanda`; those of `LayerOptions`, scope "row" by default, and

    Attributes:
        true_sequential: inside a block, let each linear see the outputs of the pruned ones before it;
            otherwise all of a block's statistics are taken in one pass, before any is pruned.
        bias_compensation: add to a layer's bias the mean of what the removed weights contributed.
            None: wherever there is a bias.
    """

    true_sequential: bool = False
    bias_compensation: bool | None = None


def wanda(
    weight: Tensor, amount: Amount, statistic: ActivationNormStatistic, options: LayerOptions
) -> PrunedWeight:
    """Prune weight [N, K] by |w| times the norm of its input feature.

    Returns:
        The weight; its `factored` is False if no input ever came (an expert without tokens): it is then
        pruned by magnitude.

    Raises:
        ValueError: NaN or Inf in the inputs.
    """
    scope = options.scope or "row"
    if statistic.rows == 0:
        plain = magnitude(weight, amount, None, LayerOptions(scope))
        return dataclasses.replace(plain, factored=False)
    w = weight.float()
    energy = w.square() * (2.0 * statistic.mean_square())
    mask = select(energy, amount, scope)
    loss = float(energy.masked_fill(mask, 0.0).sum(dtype=torch.float64))
    total = float(energy.sum(dtype=torch.float64))
    return PrunedWeight(w.masked_fill(~mask, 0.0), mask, loss, loss / total if total else 0.0)


def _layer(layer: Layer, options: WandaOptions) -> PrunedWeight:
    return wanda(layer.weight, layer.wanted, layer.statistic, options)


METHOD = PruneMethod(
    name="wanda",
    about="single weights: absolute value times the norm of its input, without an update",
    options=WandaOptions,
    amounts=("sparsity", "pattern"),
    work=SingleWeights(_layer, ActivationNormStatistic),
    compared={
        "wanda 2:4": {"pattern": "2:4"},
        "wanda 50 %": {"sparsity": 0.5},
    },
)
