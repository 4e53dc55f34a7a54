"""Hidden states and attention maps of the teacher as targets, beside its soft labels.

Layers are paired evenly; where the widths differ, a learned projection (dropped afterwards) takes the
student's states to the teacher's width (FitNets, arXiv 1412.6550; TinyBERT, arXiv 1909.10351).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.distill._distiller import plan_windows
from llmkern.distill._heads import Outputs
from llmkern.distill._method import HALF, DistillMethod
from llmkern.distill._soft_loss import SoftOptions
from llmkern.models import find_blocks, text_config


@dataclass(frozen=True)
class HiddenOptions(SoftOptions):
    """Options of white-box distillation; those of soft labels, and

    Attributes:
        hidden_weight: weight of the mean squared error of the hidden states, relative to the
            teacher's mean square.
        attention_weight: weight of the mean squared error of the attention maps, averaged over heads
            where their numbers differ; needs attn_implementation "eager" in both models.
        layers: pairs "student:teacher" of block numbers from 1, as in ("1:2", "2:4"); None pairs every
            block of the student with the one at the same depth of the teacher.
    """

    hidden_weight: float = 1.0
    attention_weight: float = 0.0
    layers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden_weight", "attention_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 0")

    def more_losses(self, student: Any, teacher: Any) -> HiddenLoss:
        """Hidden states and attention maps."""
        return HiddenLoss(student, teacher, self)


class HiddenLoss(nn.Module):
    """The additional terms; its parameters are the projections."""

    def __init__(self, student: Any, teacher: Any, options: HiddenOptions) -> None:
        super().__init__()
        self._options = options
        self.maps = options.attention_weight > 0
        self.weights = {"hidden": options.hidden_weight, "attention": options.attention_weight}
        depths = len(find_blocks(student)), len(find_blocks(teacher))
        self._pairs = _pairs(options.layers, *depths)
        if options.attention_weight:
            for name, model in (("student", student), ("teacher", teacher)):
                kind = getattr(model.config, "_attn_implementation", None)
                if kind != "eager":
                    raise ValueError(
                        f"attention_weight: got {options.attention_weight} with {kind!r} attention in "
                        f"the {name}, expected attn_implementation='eager', which alone returns maps"
                    )
        narrow, wide = (int(text_config(model).hidden_size) for model in (student, teacher))
        weight = next(student.parameters())
        self.projections = nn.ModuleList()
        if narrow != wide:
            self.projections.extend(
                nn.Linear(narrow, wide, bias=False, device=weight.device, dtype=weight.dtype)
                for _ in self._pairs
            )

    def sums(self, teacher: Outputs, counts: Tensor) -> Tensor:
        """Sum of the squares of the teacher's states, of each pair, float32 [pairs]."""
        states = (teacher.states[theirs - 1][counts].float() for _, theirs in self._pairs)
        return torch.stack([state.square().sum() for state in states])

    def forward(
        self,
        student: Outputs,
        teacher: Outputs,
        counts: Tensor,
        share: Tensor,
        sums: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """{"hidden", "attention"}: a batch's part of a step's losses, means over pairs.

        Args:
            student, teacher: with their states, and maps if these are compared.
            counts: bool [B, T], the tokens whose states are compared.
            share: of the batch in the step's predictions.
            sums: `sums` of the step; None where the batch stands for it.
        """
        whole = self.sums(teacher, counts) / share if sums is None else sums
        hidden = []
        for i, (mine, theirs) in enumerate(self._pairs):
            a, b = student.states[mine - 1], teacher.states[theirs - 1].detach()
            if len(self.projections):
                a = self.projections[i](a)
            error = (a[counts].float() - b[counts].float()).square().sum()
            hidden.append(error / whole[i].clamp(min=torch.finfo(whole.dtype).tiny))
        losses = {"hidden": torch.stack(hidden).mean()}
        if self._options.attention_weight:
            maps = []
            for mine, theirs in self._pairs:
                a, b = student.attentions[mine - 1].float(), teacher.attentions[theirs - 1].float()
                if a.shape[1] != b.shape[1]:
                    a, b = a.mean(1, keepdim=True), b.mean(1, keepdim=True)
                maps.append((a - b).square().sum(-1).mean())
            losses["attention"] = torch.stack(maps).mean() * share
        return losses


def _pairs(layers: tuple[str, ...] | None, mine: int, theirs: int) -> list[tuple[int, int]]:
    if layers is None:
        return [(i, max(1, round(i * theirs / mine))) for i in range(1, mine + 1)]
    pairs = []
    for entry in layers:
        a, colon, b = entry.partition(":")
        if not (colon and a.isdigit() and b.isdigit()):
            raise ValueError(f"layers: got {entry!r}, expected STUDENT:TEACHER such as 2:4")
        pair = (int(a), int(b))
        if not (1 <= pair[0] <= mine and 1 <= pair[1] <= theirs):
            raise ValueError(f"layers: got {entry!r}, expected blocks 1 to {mine} : 1 to {theirs}")
        pairs.append(pair)
    return pairs


METHOD = DistillMethod(
    name="hidden",
    about="soft labels, and the teacher's hidden states and attention maps",
    options=HiddenOptions,
    plan=plan_windows,
    compared={"distill hidden": {**HALF}},
)
