"""Generalized knowledge distillation: the student is corrected on what it writes itself.

In a fraction of the steps the rows are the student's own samples, in the others the data; on both, each
token's distribution is drawn to the teacher's by a divergence (`llmkern.ops.kd_loss`). Gradients do not
pass through the sampling. Agarwal et al. 2023, arXiv 2306.13649, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmkern.distill._distiller import Distiller
from llmkern.distill._generate import seeded_uniforms
from llmkern.distill._method import HALF, DistillMethod
from llmkern.distill._on_policy import OnPolicy, OnPolicyOptions
from llmkern.distill._plan import DistillJob, Plan
from llmkern.distill._soft_loss import SoftOptions
from llmkern.train import Place


@dataclass(frozen=True)
class GkdOptions(OnPolicyOptions):
    """Options of GKD; those of the samples, and

    Attributes:
        on_policy: fraction of the steps that train on the student's samples, in [0, 1]; the others train
            on the data's windows.
        temperature: T of both softmaxes; the divergence is multiplied by T^2.
        divergence: from the teacher: "forward_kl", "reverse_kl" or "jsd".
        beta: of "jsd", in (0, 1).
    """

    on_policy: float = 0.5
    temperature: float = 1.0
    divergence: str = "jsd"
    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.on_policy <= 1:
            raise ValueError(f"on_policy: got {self.on_policy}, expected a fraction in [0, 1]")
        self.soft()

    def soft(self) -> SoftOptions:
        """The loss of both kinds of rows."""
        return SoftOptions(1.0, self.temperature, self.divergence, self.beta)


def plan_gkd(job: DistillJob, options: GkdOptions) -> Plan:
    """The soft labels' module on rows of the student or of the data.

    Raises:
        ValueError: what `OnPolicy` raises, different tokenizers, bad data.
    """
    job.check_tokens()
    sampler = OnPolicy(job, options)
    windows = sampler.data(job, needed=options.on_policy < 1)

    def prepare(batch: dict[str, Tensor], place: Place) -> dict[str, Tensor]:
        # The whole step is of one kind, on all processes.
        chance = float(seeded_uniforms(1, "gkd", job.training.seed, place.step))
        if chance >= options.on_policy:
            return batch
        rows = sampler(batch["input_ids"], place)
        names = ("input_ids", "attention_mask", "labels")
        return {name: getattr(rows, name) for name in names}

    module = Distiller(job.student, job.teacher, options.soft(), job.vocabulary)
    return Plan(module, {"input_ids": windows}, prepare)


METHOD = DistillMethod(
    name="gkd",
    about="a divergence of the logits on the student's own samples",
    options=GkdOptions,
    plan=plan_gkd,
    reads_windows=lambda options: options.on_policy < 1 or options.prompts is None,
    compared={"distill gkd": {**HALF}},
)
