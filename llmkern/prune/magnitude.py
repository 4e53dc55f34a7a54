"""Magnitude pruning: the weights with the smallest absolute values go (Han et al. 2015, 1506.02626)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmkern.calibrate import InputStatistic
from llmkern.drive import Layer
from llmkern.prune._amount import Amount
from llmkern.prune._layers import LayerOptions, SingleWeights
from llmkern.prune._method import PruneMethod
from llmkern.prune._report import PrunedWeight
from llmkern.prune._select import select


@dataclass(frozen=True)
class MagnitudeOptions(LayerOptions):
    """Options of `magnitude`; those of `LayerOptions`, scope "layer" by default, and

    Attributes:
        bias_compensation: add to a layer's bias the mean of what the removed weights contributed, which
            needs calibration data. None: wherever there is a bias.
    """

    bias_compensation: bool | None = None


def magnitude(
    weight: Tensor, amount: Amount, statistic: InputStatistic | None, options: LayerOptions
) -> PrunedWeight:
    """Prune weight [N, K] by |w|. The statistic is not read."""
    w = weight.float()
    mask = select(w.abs(), amount, options.scope or "layer")
    loss = float(w.masked_fill(mask, 0.0).square().sum(dtype=torch.float64))
    total = float(w.square().sum(dtype=torch.float64))
    return PrunedWeight(w.masked_fill(~mask, 0.0), mask, loss, loss / total if total else 0.0)


def _layer(layer: Layer, options: MagnitudeOptions) -> PrunedWeight:
    return magnitude(layer.weight, layer.wanted, layer.statistic, options)


METHOD = PruneMethod(
    name="magnitude",
    about="single weights: the smallest absolute values go",
    options=MagnitudeOptions,
    amounts=("sparsity", "pattern"),
    work=SingleWeights(_layer),
    undecided={"bias_compensation": False},
    compared={
        "magnitude 2:4": {"pattern": "2:4"},
        "magnitude 50 %": {"sparsity": 0.5},
    },
)
