"""Train a small model to do what a large one does."""

from llmkern.distill._driver import METHODS, DistillReport, distill
from llmkern.distill._method import DistillMethod
from llmkern.distill._soft_loss import SoftOptions
from llmkern.distill._student import make_student
from llmkern.distill.gkd import GkdOptions
from llmkern.distill.hidden import HiddenOptions
from llmkern.distill.in_context import InContextOptions
from llmkern.distill.minillm import MiniLlmOptions
from llmkern.distill.sequence import SequenceOptions

__all__ = [
    "METHODS",
    "DistillMethod",
    "DistillReport",
    "GkdOptions",
    "HiddenOptions",
    "InContextOptions",
    "MiniLlmOptions",
    "SequenceOptions",
    "SoftOptions",
    "distill",
    "make_student",
]
