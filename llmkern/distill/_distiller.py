"""The module that is trained: a student, and the losses that tie it to its teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmkern.distill._heads import Outputs, Reader
from llmkern.distill._plan import DistillJob, Plan
from llmkern.distill._soft_loss import SoftOptions, soft_loss


class Distiller(nn.Module):
    """Student, projections and loss as one module, so that one forward is all that a step needs."""

    def __init__(
        self, student: Any, teacher: Any, options: SoftOptions, vocabulary: int | None = None
    ) -> None:
        """The teacher may be None where the options ask for none (alpha 0).

        `vocabulary` is the number of the first tokens that are predicted, None for all.
        """
        super().__init__()
        self.student = student
        self.extra = options.more_losses(student, teacher)
        # In a list, so that the teacher is neither trained, saved nor wrapped with the rest.
        self._teacher = [teacher]
        self._options = options
        self._vocabulary = vocabulary
        self._readers = Reader(), Reader()

    def forward(self, batch: dict[str, Tensor], num_items: float) -> dict[str, Tensor]:
        """{"loss", "ce", "kd", ...}, sums over the batch's predictions divided by num_items.

        Args:
            batch: input_ids int64 [B, T], attention_mask where rows are padded, labels where not every
                token is predicted. teacher_ids, teacher_mask and teacher_labels where the teacher
                reads other rows, of which it predicts the same tokens in the same order. What `sums`
                returns, of the whole step, where this is only a part of one.
            num_items: as `llmkern.train.fit` passes it.
        """
        options = self._options
        states = self.extra is not None
        maps = self.extra is not None and self.extra.maps
        labels = batch.get("labels", batch["input_ids"])
        keep = labels[:, 1:] != -100 if "labels" in batch else None
        wanted = labels[:, 1:].flatten() if keep is None else labels[:, 1:][keep]
        mine = self._readers[0](self.student, batch, states, maps)
        theirs: Outputs | None = None
        if options.alpha > 0 or states:
            theirs = self._ask_teacher(batch, states, maps)
        target: Outputs | None = None
        if theirs is not None and options.alpha > 0:
            other = batch.get("teacher_labels")
            asked = keep if other is None else other[:, 1:] != -100
            target = theirs.predicting(asked, self._vocabulary)
        own = mine.predicting(keep, self._vocabulary)
        losses = soft_loss(own, target, wanted, options, num_items)
        if self.extra is not None:
            assert theirs is not None
            share = (labels[:, 1:] != -100).sum() / num_items
            extra = self.extra(mine, theirs, labels != -100, share, batch.get("sums"))
            total = sum(self.extra.weights[name] * value for name, value in extra.items())
            losses |= extra | {"loss": losses["loss"] + total}
        return losses

    def sums(self, batch: dict[str, Tensor]) -> Tensor:
        """What `forward` needs of all batches of a step."""
        assert self.extra is not None
        labels = batch.get("labels", batch["input_ids"])
        return self.extra.sums(self._ask_teacher(batch, True, False), labels != -100)

    @torch.no_grad()
    def _ask_teacher(self, batch: dict[str, Tensor], states: bool, maps: bool) -> Outputs:
        teacher = self._teacher[0]
        device = next(teacher.parameters()).device
        names = ("input_ids", "attention_mask")
        if "teacher_ids" in batch:
            names = ("teacher_ids", "teacher_mask")
        inputs = {
            key: batch[name].to(device)
            for key, name in zip(("input_ids", "attention_mask"), names, strict=True)
            if name in batch
        }
        outputs = self._readers[1](teacher, inputs, states, maps)
        return outputs.to(batch["input_ids"].device)


def plan_windows(job: DistillJob, options: SoftOptions) -> Plan:
    """The plan of methods that compare logits on windows of the data.

    Raises:
        ValueError: different tokenizers or vocabularies, bad data.
    """
    job.check_tokens()
    windows = job.windows()
    module = Distiller(job.student, job.teacher, options, job.vocabulary)
    return Plan(module, {"input_ids": windows}, sums=module.sums if module.extra else None)
