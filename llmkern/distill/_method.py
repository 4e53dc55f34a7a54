"""What a method of distillation is, and the memory that training a student takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmkern.distill._plan import DistillJob, Plan
from llmkern.drive import Method, Shapes, Tokens
from llmkern.drive.shapes import F32
from llmkern.models import text_config, vocabulary_size
from llmkern.train import TrainOptions

_KD_CHUNK = 3 << 22  # elements of a chunk's logits, of both models and the gradient

# In the comparison, students are half of the model's blocks.
HALF = {"student": {"layers": 0.5}}


@dataclass(frozen=True, kw_only=True)
class DistillMethod(Method):
    """A way to distill; in `compared`, prompts that are None become beginnings of calibration windows.

    Attributes:
        plan: what is trained on what, from the job and the method's options.
        answers: it trains on a teacher's answers to prompts instead of windows of text, and as text they
            suit any vocabulary.
        reads_windows: (options) -> whether it trains on windows of text at all.
        needs_teacher: (options) -> whether a teacher is asked for anything.
    """

    plan: Callable[[DistillJob, Any], Plan]
    answers: bool = False
    reads_windows: Callable[[Any], bool] = lambda options: True
    needs_teacher: Callable[[Any], bool] = lambda options: True


def training_nbytes(
    training: TrainOptions, teacher: Shapes, student: Shapes, tokens: Tokens
) -> int:
    """Bytes at the peak of the training, both models included."""
    trained = sum(p.numel() for p in student.model.parameters())
    held = trained * F32 * (2 + _states(training))
    passing = tokens.backward(student, training.batch_size) + tokens.activations(
        teacher, training.batch_size
    )
    head: int = (vocabulary_size(student.model) or 0) * text_config(student.model).hidden_size * F32
    return teacher.weights() + held + passing + head + _KD_CHUNK * F32


def training_journal(training: TrainOptions, student: Shapes) -> int:
    """Bytes on the disk of the training's newest state and the one being written."""
    trained = sum(p.numel() for p in student.model.parameters())
    return 2 * trained * F32 * (1 + _states(training))


def _states(training: TrainOptions) -> int:
    """Float32 numbers that the optimizer keeps of each weight."""
    return 1 if training.optimizer == "lion" else 2
