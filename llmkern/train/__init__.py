"""One training loop for everything that trains: distillation, recovery, fine-tuning."""

from llmkern.train._loop import Order, Place, Prepare, Step, Sums, TrainReport, fit
from llmkern.train._options import TrainOptions
from llmkern.train.lion import Lion

__all__ = [
    "Lion",
    "Order",
    "Place",
    "Prepare",
    "Step",
    "Sums",
    "TrainOptions",
    "TrainReport",
    "fit",
]
