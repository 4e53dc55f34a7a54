"""Structured pruning of MLPs: neurons go with their rows of gate and up and their column of down.

A neuron of a gated unit is the product of a row of gate and one of up: only all three together can be
removed without changing what the others do.
"""

from __future__ import annotations

from llmkern.prune._job import Job, Method
from llmkern.prune._options import WidthOptions
from llmkern.prune._structured import prune_units


def glu(job: Job) -> None:
    """Remove neurons of gated MLPs (gate, up, down; also with gate and up fused) from every block.

    Raises:
        ValueError: a block has no gated MLP (named), and what `prune_units` raises.
    """
    prune_units(job, ("glu",))


def mlp(job: Job) -> None:
    """Remove neurons of the MLPs of every block, whether of two matrices or gated.

    Raises:
        ValueError: a block has no MLP of dense linears (named), and what `prune_units` raises.
    """
    prune_units(job, ("mlp", "glu"))


GLU = Method(WidthOptions, ("ratio",), glu, needs_amount=False)
MLP = Method(WidthOptions, ("ratio",), mlp, needs_amount=False)
