"""MiniLLM: reverse KL of whole texts by policy gradient (Gu et al. 2023, arXiv 2306.08543, section 2.2).

With the student q, the teacher p and texts y drawn from b = (1 - a) q + a p (teacher-mixed sampling):

    r_t  = log p(y_t) - log q(y_t),   R_t = sum of r over t, t + 1, ...
    grad = E_b sum_t w_t (grad KL(q_t || p_t) - R_{t+1} grad log q(y_t))

The first term is the derivative of the next step's divergence, exact over the vocabulary; the second is
what y_t does to all later steps, divided by their number (length normalisation). w_t are importance
weights. The language modelling loss on the data is added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmkern.distill._generate import Sampled
from llmkern.distill._heads import Outputs, Reader
from llmkern.distill._method import HALF, DistillMethod
from llmkern.distill._on_policy import OnPolicy, OnPolicyOptions
from llmkern.distill._plan import DistillJob, Plan
from llmkern.distill._soft_loss import SoftOptions, soft_loss
from llmkern.reference.kd_loss import kl_rows
from llmkern.train import Place

WEIGHTINGS = ("token", "sequence")

# Elements of the logits that exist at once.
_CHUNK = 1 << 24


@dataclass(frozen=True)
class MiniLlmOptions(OnPolicyOptions):
    """Options of MiniLLM; those of the samples (all of the vocabulary: top_p is 1), and

    Attributes:
        teacher_mix: share a of the teacher in the distribution that tokens are drawn from, in
            [0, 1).
        importance: weights: "token": w_t = q(y_t) / b(y_t), the paper's approximation, of small variance;
            "sequence": products of these over all tokens up to the one that is weighed, exact.
        max_weight: largest weight; None for no limit.
        length_norm: divide what a token earns by the number of tokens that earn it.
        lm_weight: weight of the cross-entropy on the data's windows; 0 reads no data.
        refresh: steps that train on the same samples before new ones are drawn; checkpoints are written
            where new ones are.
    """

    teacher_mix: float = 0.2
    importance: str = "token"
    max_weight: float | None = 10.0
    length_norm: bool = True
    lm_weight: float = 1.0
    refresh: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_p != 1 or self.sample_temperature == 0:
            name = "top_p" if self.top_p != 1 else "sample_temperature"
            raise ValueError(
                f"{name}: got {getattr(self, name)}, expected "
                f"{'1' if name == 'top_p' else 'more than 0'}: importance weights need every token to "
                "be possible"
            )
        if not 0 <= self.teacher_mix < 1:
            raise ValueError(f"teacher_mix: got {self.teacher_mix}, expected a share in [0, 1)")
        if self.importance not in WEIGHTINGS:
            raise ValueError(
                f"importance: got {self.importance!r}, expected one of {', '.join(WEIGHTINGS)}"
            )
        if self.max_weight is not None and not self.max_weight > 0:
            raise ValueError(
                f"max_weight: got {self.max_weight}, expected a positive number or None"
            )
        if self.lm_weight < 0:
            raise ValueError(f"lm_weight: got {self.lm_weight}, expected at least 0")
        if self.refresh < 1:
            raise ValueError(f"refresh: got {self.refresh}, expected at least 1")


def plan_minillm(job: DistillJob, options: MiniLlmOptions) -> Plan:
    """Samples of the mixture, and the policy gradient's module.

    Raises:
        ValueError: what `OnPolicy` raises, different tokenizers, bad data.
    """
    job.check_tokens()
    sampler = OnPolicy(job, options, options.teacher_mix)
    windows = sampler.data(job, needed=options.lm_weight > 0)
    kept: dict[int, Sampled] = {}

    def prepare(batch: dict[str, Tensor], place: Place) -> dict[str, Tensor]:
        if place.step % options.refresh == 0:
            kept[place.micro] = sampler(batch["input_ids"], place)
        rows = kept[place.micro]._asdict()
        return rows | ({"windows": batch["input_ids"]} if options.lm_weight else {})

    module = MiniLlm(job.student, job.teacher, options, job.training.accumulate, job.vocabulary)
    return Plan(module, {"input_ids": windows}, prepare, every=options.refresh)


class MiniLlm(nn.Module):
    """A student, and the loss whose gradient is the policy gradient."""

    def __init__(
        self,
        student: Any,
        teacher: Any,
        options: MiniLlmOptions,
        accumulate: int = 1,
        vocabulary: int | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        # In a list, so that the teacher is neither trained, saved nor wrapped with the rest.
        self._teacher = [teacher]
        self._options, self._accumulate = options, accumulate
        self._vocabulary = vocabulary
        self._readers = Reader(), Reader()

    def forward(self, batch: dict[str, Tensor], num_items: float) -> dict[str, Tensor]:
        """{"loss", "kd", "ce"}: the surrogate, the reverse KL per drawn token, the data's cross-entropy.

        Args:
            batch: what `Sampled` holds, and "windows" int64 [B, T] where lm_weight is not 0.
            num_items: as `llmkern.train.fit` passes it.
        """
        keep = batch["labels"][:, 1:] != -100
        wanted = batch["labels"][:, 1:][keep]
        mine = self._readers[0](self.student, batch).predicting(keep, self._vocabulary)
        teacher = self._teacher[0]
        with torch.no_grad():
            device = next(teacher.parameters()).device
            inputs = {k: batch[k].to(device) for k in ("input_ids", "attention_mask")}
            theirs = self._readers[1](teacher, inputs)
            theirs = theirs.predicting(keep.to(device), self._vocabulary)
        log_q, log_p, kl = _terms(mine, theirs.to(wanted.device), wanted)
        drawn = batch["log_probs"][:, 1:][keep]
        loss = policy_loss((log_q, log_p, kl, drawn), keep, self._options) / num_items
        losses = {"loss": loss, "kd": kl.detach().sum() / num_items}
        if self._options.lm_weight:
            windows = batch["windows"]
            rows = self._readers[0](self.student, {"input_ids": windows})
            rows = rows.predicting(vocabulary=self._vocabulary)
            count = windows[:, 1:].numel() * self._accumulate
            ce = soft_loss(rows, None, windows[:, 1:].flatten(), SoftOptions(0.0), count)["loss"]
            losses |= {"loss": loss + self._options.lm_weight * ce, "ce": ce.detach()}
        return losses


def policy_loss(
    terms: tuple[Tensor, Tensor, Tensor, Tensor], keep: Tensor, options: MiniLlmOptions
) -> Tensor:
    """The sum over all drawn tokens whose gradient is the policy gradient (see the module's head).

    Args:
        terms: float [n] each, of the drawn tokens row by row: log q and log p of the token, KL(q || p)
            at its position, log of the probability with which it was drawn. Gradients flow through the
            first and the third.
        keep: bool [B, T], where these tokens stand.
        options: weights and normalisation.
    """

    def placed(values: Tensor) -> Tensor:
        return torch.zeros(keep.shape, dtype=values.dtype, device=values.device).masked_scatter(
            keep, values
        )

    log_q, log_p, kl, drawn = (placed(values) for values in terms)
    ratio = (log_q.detach() - drawn).exp()  # 1 where nothing was drawn
    weights = ratio if options.importance == "token" else ratio.cumprod(1)
    if options.max_weight is not None:
        weights = weights.clamp(max=options.max_weight)
    reward = log_p - log_q.detach()
    if options.importance == "token":
        single, gain = weights, weights * _later(reward)
    else:
        # The step's own token is summed over, so only those before it are weighed.
        single = torch.cat([torch.ones_like(weights[:, :1]), weights[:, :-1]], 1)
        gain = _later(weights * reward)
    if options.length_norm:
        gain = gain / _later(keep.to(gain.dtype)).clamp(min=1)
    return (single * kl - gain * log_q).sum()


def _later(values: Tensor) -> Tensor:
    """[B, T]: at each place the sum of those behind it."""
    return values.flip(1).cumsum(1).flip(1) - values


def _terms(student: Outputs, teacher: Outputs, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log q and log p of the wanted tokens and KL(q || p), [n] each, logits for a few rows at a time."""
    head = student.head
    V = student.all_logits().shape[-1] if head is None else len(head)
    mine = student.logits if student.hidden is None else student.hidden
    theirs = teacher.logits if teacher.hidden is None else teacher.hidden
    assert mine is not None
    assert theirs is not None
    found, size = [], max(1, _CHUNK // V)
    for start in range(0, len(wanted), size):
        rows = slice(start, start + size)
        inputs = (mine[rows], head, theirs[rows], teacher.head, wanted[rows])
        # Backward computes the chunk's logits again.
        found.append(checkpoint(_chunk, *inputs, use_reentrant=False, preserve_rng_state=False))
    log_q, log_p, kl = (torch.cat(values) for values in zip(*found, strict=True))
    return log_q, log_p, kl


def _chunk(
    mine: Tensor, head: Tensor | None, theirs: Tensor, their_head: Tensor | None, wanted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    logits = mine if head is None else mine @ head.t()
    target = theirs if their_head is None else theirs @ their_head.t()
    work = torch.promote_types(logits.dtype, torch.float32)
    q, p = logits.to(work).log_softmax(-1), target.to(work).log_softmax(-1)
    kl = kl_rows(q, p)
    return q.gather(1, wanted[:, None])[:, 0], p.gather(1, wanted[:, None])[:, 0], kl


METHOD = DistillMethod(
    name="minillm",
    about="reverse KL of the student's own samples, by policy gradient",
    options=MiniLlmOptions,
    plan=plan_minillm,
    reads_windows=lambda options: options.lm_weight > 0 or options.prompts is None,
    compared={"distill minillm": {**HALF}},
)
