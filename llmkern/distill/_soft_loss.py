"""The loss of soft labels and its options, which other methods build on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llmkern.distill._heads import Outputs
from llmkern.ops.kd_loss import kd_loss
from llmkern.reference.kd_loss import DIVERGENCES
from llmkern.reference.kd_loss import kd_loss as plain_loss


class MoreLosses(Protocol):
    """Losses beside that of the logits, a module if they are trained.

    Attributes:
        maps: attention maps are compared, too.
        weights: of each loss, by its name.
    """

    maps: bool
    weights: dict[str, float]

    def __call__(self, *args: Any) -> dict[str, Tensor]:
        """A batch's part of a step's losses by name.

        Of both models' `Outputs`, a mask [B, T] of what counts, the batch's share of the step's
        predictions, and the step's `sums`, or None if the batch is all that there is.
        """

    def sums(self, teacher: Outputs, counts: Tensor) -> Tensor:
        """What is added up over a step before its first forward."""


@dataclass(frozen=True)
class SoftOptions:
    """Options of soft-label distillation.

    Attributes:
        alpha: weight of the divergence from the teacher, in [0, 1]; 0 trains on the data alone.
        temperature: T of both softmaxes; the divergence is multiplied by T^2.
        divergence: from the teacher: "forward_kl", "reverse_kl" or "jsd".
        beta: of "jsd", in (0, 1).
    """

    alpha: float = 0.5
    temperature: float = 2.0
    divergence: str = "forward_kl"
    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: got {self.alpha}, expected a weight in [0, 1]")
        if not self.temperature > 0:
            raise ValueError(f"temperature: got {self.temperature}, expected a positive number")
        if self.divergence not in DIVERGENCES:
            raise ValueError(
                f"divergence: got {self.divergence!r}, expected one of {', '.join(DIVERGENCES)}"
            )
        if not 0 < self.beta < 1:
            raise ValueError(f"beta: got {self.beta}, expected a weight in (0, 1)")

    def more_losses(self, student: Any, teacher: Any) -> MoreLosses | None:
        """Losses beside this one, or None."""
        return None


def soft_loss(
    student: Outputs,
    teacher: Outputs | None,
    wanted: Tensor,
    options: SoftOptions,
    num_items: float,
) -> dict[str, Tensor]:
    """{"loss", "ce", "kd"} of a batch.

    Args:
        student, teacher: rows [n, D] or [n, V] that predict the same tokens (`Outputs.predicting`); no
            teacher if alpha is 0.
        wanted: int64 [n], what they are to predict, -100 where a row does not count.
        options: the loss.
        num_items: what the sums are divided by.
    """
    if student.hidden is None or student.head is None:
        return _from_logits(student, teacher, wanted, options, num_items)
    teacher_logits = teacher_hidden = teacher_head = None
    if teacher is not None and teacher.hidden is not None and teacher.head is not None:
        teacher_hidden, teacher_head = teacher.hidden, teacher.head
    elif teacher is not None:
        teacher_logits = teacher.all_logits()
    out = kd_loss(
        student.hidden,
        student.head,
        wanted,
        teacher_logits=teacher_logits,
        teacher_hidden=teacher_hidden,
        teacher_head=teacher_head,
        alpha=options.alpha,
        temperature=options.temperature,
        divergence=options.divergence,
        beta=options.beta,
        num_items=num_items,
    )
    return {"loss": out.loss, "ce": out.ce, "kd": out.kd}


def _from_logits(
    student: Outputs,
    teacher: Outputs | None,
    wanted: Tensor,
    options: SoftOptions,
    num_items: float,
) -> dict[str, Tensor]:
    """For a head with a bias, a cap or a scale: its logits for all tokens, as the model makes them."""
    logits = student.all_logits().float()
    if teacher is None:
        ce = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
        return {"loss": ce / num_items, "ce": ce / num_items, "kd": torch.zeros_like(ce)}
    losses = plain_loss(
        logits,
        teacher.all_logits().float(),
        wanted,
        alpha=options.alpha,
        temperature=options.temperature,
        divergence=options.divergence,
        beta=options.beta,
    )
    share = (wanted != -100).sum() / num_items
    return {name: v * share for name, v in zip(("loss", "ce", "kd"), losses, strict=True)}
