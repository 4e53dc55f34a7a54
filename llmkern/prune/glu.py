"""Structured pruning of MLPs: neurons go with their rows of gate and up and their column of down.

A neuron of a gated unit is the product of a row of gate and one of up: only all three together can be
removed without changing what the others do.
"""

from __future__ import annotations

from llmkern.prune._method import PruneMethod
from llmkern.prune._options import WidthOptions
from llmkern.prune._structured import UnitWork

# Neurons of gated MLPs (gate, up, down; also with gate and up fused).
GLU = PruneMethod(
    name="glu",
    about="neurons of gated MLPs, with their rows of gate and up and their column of down",
    options=WidthOptions,
    amounts=("ratio",),
    work=UnitWork(lambda options: ("glu",)),
    needs_amount=False,
    compared={"glu 20 %": {"ratio": 0.2}},
)

# Neurons of MLPs whether of two matrices or gated.
MLP = PruneMethod(
    name="mlp",
    about="neurons of MLPs of any kind",
    options=WidthOptions,
    amounts=("ratio",),
    work=UnitWork(lambda options: ("mlp", "glu")),
    needs_amount=False,
    compared={"mlp 20 %": {"ratio": 0.2}},
)
