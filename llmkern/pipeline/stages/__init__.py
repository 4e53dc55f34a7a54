"""The stages of a pipeline: which driver each calls, with which options, and what it needs.

A stage is made with its options and refuses wrong ones at once; `run` hands them to the driver. A new
kind of stage is a class in a file here and an entry of `STAGES`.
"""

from typing import Any

from llmkern.pipeline.stages._stage import Context, Stage, fit_to_later, source_of
from llmkern.pipeline.stages.distill import Distill
from llmkern.pipeline.stages.prune import Prune
from llmkern.pipeline.stages.quantize import Quantize

STAGES: dict[str, type[Stage[Any]]] = {kind.name: kind for kind in (Prune, Quantize, Distill)}

__all__ = [
    "STAGES",
    "Context",
    "Distill",
    "Prune",
    "Quantize",
    "Stage",
    "fit_to_later",
    "source_of",
]
