"""Pruning methods, and the function that applies one to a whole model."""

from llmkern.masks import MaskedParameters, keep_masks, pruned_layers
from llmkern.prune._amount import Pattern
from llmkern.prune._driver import METHODS, prune
from llmkern.prune._method import PruneMethod
from llmkern.prune._options import WidthOptions
from llmkern.prune._report import PrunedLayer, PrunedWeight, PruneReport, WidthReport
from llmkern.prune.depth import DepthOptions
from llmkern.prune.magnitude import MagnitudeOptions
from llmkern.prune.sparsegpt import SparseGptOptions
from llmkern.prune.taylor import TaylorOptions
from llmkern.prune.wanda import WandaOptions

__all__ = [
    "METHODS",
    "DepthOptions",
    "MagnitudeOptions",
    "MaskedParameters",
    "Pattern",
    "PruneMethod",
    "PruneReport",
    "PrunedLayer",
    "PrunedWeight",
    "SparseGptOptions",
    "TaylorOptions",
    "WandaOptions",
    "WidthOptions",
    "WidthReport",
    "keep_masks",
    "prune",
    "pruned_layers",
]
