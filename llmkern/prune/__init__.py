"""Pruning methods, and the function that applies one to a whole model."""

from llmkern.masks import MaskedParameters, keep_masks, pruned_layers
from llmkern.prune._amount import Pattern
from llmkern.prune._driver import METHODS, prune
from llmkern.prune._report import LayerReport, PrunedWeight, PruneReport
from llmkern.prune.magnitude import MagnitudeOptions
from llmkern.prune.sparsegpt import SparseGptOptions
from llmkern.prune.wanda import WandaOptions

__all__ = [
    "METHODS",
    "LayerReport",
    "MagnitudeOptions",
    "MaskedParameters",
    "Pattern",
    "PruneReport",
    "PrunedWeight",
    "SparseGptOptions",
    "WandaOptions",
    "keep_masks",
    "prune",
    "pruned_layers",
]
