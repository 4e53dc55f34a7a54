"""Train a small model to do what a large one does."""

from llmkern.distill._driver import METHODS, DistillReport, distill
from llmkern.distill._student import make_student
from llmkern.distill.hidden import HiddenOptions
from llmkern.distill.sequence import SequenceOptions
from llmkern.distill.soft import SoftOptions

__all__ = [
    "METHODS",
    "DistillReport",
    "HiddenOptions",
    "SequenceOptions",
    "SoftOptions",
    "distill",
    "make_student",
]
