"""Soft labels: cross-entropy on the data and a divergence from the teacher's distribution.

Hinton et al. 2015, arXiv 1503.02531; the loss is `llmkern.ops.kd_loss`.
"""

from __future__ import annotations

from llmkern.distill._distiller import plan_windows
from llmkern.distill._method import HALF, DistillMethod
from llmkern.distill._soft_loss import SoftOptions

METHOD = DistillMethod(
    name="soft",
    about="cross-entropy, and a divergence from the teacher's logits",
    options=SoftOptions,
    plan=plan_windows,
    compared={"distill soft": {**HALF}},
)
