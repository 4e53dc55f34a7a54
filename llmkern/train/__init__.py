"""One training loop for everything that trains: distillation, recovery, fine-tuning."""

from llmkern.train._loop import Step, TrainReport, fit
from llmkern.train._options import TrainOptions
from llmkern.train.lion import Lion

__all__ = ["Lion", "Step", "TrainOptions", "TrainReport", "fit"]
