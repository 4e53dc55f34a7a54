"""Specification of kd_loss: cross-entropy and a divergence from the teacher, by the formulas.

With student logits s, teacher logits t, temperature T, p = softmax(s / T), q = softmax(t / T):

    ce          -log softmax(s)[label]
    forward_kl  KL(q || p) = sum q (log q - log p)
    reverse_kl  KL(p || q)
    jsd         beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p
    loss        (1 - alpha) ce + alpha T^2 kd, summed over the tokens that count, over their number

Hinton et al. 2015 (arXiv 1503.02531) for T and T^2, MiniLLM (arXiv 2306.08543) for the reverse KL, GKD
(arXiv 2306.13649) for the generalized Jensen-Shannon divergence.
"""

from __future__ import annotations

import torch
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def divergence_rows(
    student: Tensor, teacher: Tensor, divergence: str, beta: float, temperature: float
) -> Tensor:
    """Divergence of each row: float [T, V] logits twice to [T]; differentiable by autograd."""
    p = (student / temperature).log_softmax(-1)
    q = (teacher / temperature).log_softmax(-1)
    if divergence == "forward_kl":
        return (q.exp() * (q - p)).sum(-1)
    if divergence == "reverse_kl":
        return (p.exp() * (p - q)).sum(-1)
    m = (beta * q.exp() + (1 - beta) * p.exp()).log()
    return beta * (q.exp() * (q - m)).sum(-1) + (1 - beta) * (p.exp() * (p - m)).sum(-1)


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    *,
    alpha: float,
    temperature: float,
    divergence: str,
    beta: float = 0.5,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, ce, kd), scalars in the dtype of the logits [T, V]; differentiable by autograd."""
    counts = torch.ones_like(student[:, 0], dtype=torch.bool)
    ce = student.new_zeros(len(student))
    if labels is not None:
        counts = labels != ignore_index
        ce = torch.nn.functional.cross_entropy(
            student, labels, reduction="none", ignore_index=ignore_index
        )
    kd = divergence_rows(student, teacher, divergence, beta, temperature)
    number = counts.sum().clamp(min=1)
    ce, kd = ce[counts].sum() / number, kd[counts].sum() / number
    return (1 - alpha) * ce + alpha * temperature**2 * kd, ce, kd


def kd_rows(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    counts: Tensor,
    alpha: float,
    temperature: float,
    divergence: str,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """Sums of ce and kd over a few rows; the gradient of the summed loss replaces the student's logits.

    The analytic form of `kd_loss`: with u = s / T and g_i the derivative of the divergence by p_i,
    d/du_i = p_i (g_i - sum_j p_j g_j), which for forward_kl is p_i - q_i.

    Args:
        student: float [C, V], overwritten.
        teacher: float [C, V]; None if alpha is 0.
        labels: int64 [C], inside the vocabulary where `counts`; None if alpha is 1.
        counts: bool [C], the rows that count.
        alpha, temperature, divergence, beta: as in `kd_loss`.

    Returns:
        ce and kd, scalars in float32 or, for float64 logits, float64.
    """
    work = torch.promote_types(student.dtype, torch.float32)
    s = student.to(work)
    gradient = torch.zeros_like(s)
    ce = kd = s.new_zeros(())
    if labels is not None:
        safe = torch.where(counts, labels, 0)[:, None]
        log_p = s.log_softmax(-1)
        ce = -(log_p.gather(1, safe)[:, 0] * counts).sum()
        if alpha < 1:
            gradient = log_p.exp_().scatter_add_(1, safe, -torch.ones_like(safe, dtype=work))
            gradient.mul_(1 - alpha)
        del log_p
    if teacher is not None:
        p = (s / temperature).log_softmax(-1)
        q = (teacher.to(work) / temperature).log_softmax(-1)
        rows, slope = _divergence(p, q, divergence, beta)
        kd = (rows * counts).sum()
        gradient.add_(slope, alpha=alpha * temperature)
    student.copy_(gradient.mul_(counts[:, None]))
    return ce, kd


def _divergence(p: Tensor, q: Tensor, divergence: str, beta: float) -> tuple[Tensor, Tensor]:
    """Divergence of each row and its derivative by the student's logits, from log-probabilities."""
    if divergence == "forward_kl":
        rows = (q.exp() * (q - p)).sum(-1)
        return rows, p.exp_().sub_(q.exp_())
    if divergence == "reverse_kl":
        difference = p - q
        rows = (p.exp() * difference).sum(-1)
        return rows, difference.sub_(rows[:, None]).mul_(p.exp_())
    log_m = torch.logaddexp(q + _log(beta), p + _log(1 - beta))
    slope = (p - log_m).mul_(1 - beta)
    mean = (p.exp() * slope).sum(-1)
    rows = beta * (q.exp() * (q - log_m)).sum(-1) + mean
    return rows, slope.sub_(mean[:, None]).mul_(p.exp_())


def _log(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).log())
