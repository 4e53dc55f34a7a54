"""Specification of kd_loss: cross-entropy and a divergence from the teacher, by the formulas.

With student logits s, teacher logits t, temperature T, p = softmax(s / T), q = softmax(t / T):

    ce          -log softmax(s)[label]
    forward_kl  KL(q || p) = sum q (log q - log p)
    reverse_kl  KL(p || q)
    jsd         beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p
    loss        (1 - alpha) ce + alpha T^2 kd, summed over the tokens that count, over their number

A token without probability counts for nothing, since x log x goes to 0: a vocabulary may be masked by
logits of -inf. A divergence is inf where the one distribution has mass and the other, which it is
measured against, none. A row that counts and has no distribution (NaN, +inf, or -inf throughout) makes
NaN.

Hinton et al. 2015 (arXiv 1503.02531) for T and T^2, MiniLLM (arXiv 2306.08543) for the reverse KL, GKD
(arXiv 2306.13649) for the generalized Jensen-Shannon divergence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / T) of float [..., V]; no T takes finite logits out of the range."""
    top = logits.detach().amax(-1, keepdim=True)
    return ((logits - top) / temperature).log_softmax(-1)


def kl_rows(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of each row of log-probabilities [..., V], entries without probability left out."""
    a = log_a.exp()
    # Replaced before the product, so that no derivative passes through an infinity either.
    nothing = a == 0
    return (a * (log_a.masked_fill(nothing, 0) - log_b.masked_fill(nothing, 0))).sum(-1)


def divergence_rows(
    student: Tensor, teacher: Tensor, divergence: str, beta: float, temperature: float
) -> Tensor:
    """Divergence of each row: float [T, V] logits twice to [T]; differentiable by autograd."""
    p, q = log_probabilities(student, temperature), log_probabilities(teacher, temperature)
    if divergence == "forward_kl":
        return kl_rows(q, p)
    if divergence == "reverse_kl":
        return kl_rows(p, q)
    m = beta * q.exp() + (1 - beta) * p.exp()
    m = m.masked_fill(m == 0, 1).log()
    return beta * kl_rows(q, m) + (1 - beta) * kl_rows(p, m)


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
    ce = student.new_zeros(())
    if labels is not None:
        counts = labels != ignore_index
        ce = torch.nn.functional.cross_entropy(student[counts], labels[counts], reduction="sum")
    kd = divergence_rows(student[counts], teacher[counts], divergence, beta, temperature)
    number = counts.sum().clamp(min=1)
    ce, kd = ce / number, kd.sum() / number
    return weighted(ce, kd, alpha, temperature), ce, kd


def weighted(ce: Tensor, kd: Tensor, alpha: float, temperature: float) -> Tensor:
    """(1 - alpha) ce + alpha T^2 kd; what has no weight may be infinite."""
    if alpha in (0, 1):
        return temperature**2 * kd if alpha else ce + 0
    return (1 - alpha) * ce + alpha * temperature**2 * kd


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
    skipped = ~counts
    if labels is not None:
        safe = labels.masked_fill(skipped, 0)[:, None]
        log_p = s.log_softmax(-1)
        ce = -log_p.gather(1, safe)[:, 0].masked_fill(skipped, 0).sum()
        if alpha < 1:
            gradient = log_p.exp_().scatter_add_(1, safe, -torch.ones_like(safe, dtype=work))
            gradient.mul_(1 - alpha)
        del log_p
    if teacher is not None:
        p = log_probabilities(s, temperature)
        q = log_probabilities(teacher.to(work), temperature)
        rows, slope = _divergence(p, q, divergence, beta)
        kd = rows.masked_fill(skipped, 0).sum()
        if alpha > 0:
            gradient.add_(slope, alpha=alpha * temperature)
    student.copy_(gradient.masked_fill_(skipped[:, None], 0))
    return ce, kd


def _divergence(p: Tensor, q: Tensor, divergence: str, beta: float) -> tuple[Tensor, Tensor]:
    """Divergence of each row and its derivative by the student's logits, from log-probabilities."""
    if divergence == "forward_kl":
        return kl_rows(q, p), p.exp().sub_(q.exp())
    mass = p.exp()
    if divergence == "reverse_kl":
        slope = (p - q).masked_fill_(mass == 0, 0)
        rows = mean = (mass * slope).sum(-1)
    else:
        log_m = torch.logaddexp(q + math.log(beta), p + math.log(1 - beta))
        slope = (p - log_m).masked_fill_(mass == 0, 0).mul_(1 - beta)
        mean = (mass * slope).sum(-1)
        rows = beta * kl_rows(q, log_m) + mean
    return rows, slope.sub_(mean[:, None]).mul_(mass)
