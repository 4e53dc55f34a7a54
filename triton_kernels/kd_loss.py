"""kd_loss of a few rows: cross-entropy, a divergence from the teacher, and the gradient in place.

Bound by memory: each program owns one row of the vocabulary and reads student and teacher logits two or
three times (from L2 where the row fits), once for the softmax normalisers, once for the sums that the
gradient needs (not for forward_kl), once to write the gradient over the student's logits. All
arithmetic is in float32; nothing of the size of the row lives outside these two buffers. The formulas
are those of llmkern/reference/kd_loss.py.

Run in Triton's interpreter and compiled ahead of time for sm_80 and sm_90; not yet run on a GPU.
"""

import math

import torch
import triton
import triton.language as tl

from .device import on_device

DIVERGENCES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}
BLOCK_V = 4096


@triton.jit
def _rescale(top, total, x, temperature):
    """A running maximum and sum of exponentials of (x - maximum) / temperature after the values x."""
    higher = tl.maximum(top, tl.max(x, 0))
    # Nothing but -inf so far: a sum of nothing.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    scale = tl.exp((top - base) / temperature)
    return higher, total * scale + tl.sum(tl.exp((x - base) / temperature), 0)


@triton.jit
def _gap(mass, a, b):
    """a - b of logarithms where there is mass, else 0: a logit of -inf counts for nothing."""
    return tl.where(mass == 0.0, 0.0, a - b)


@triton.jit
def _terms(p, q, log_beta, log_rest, KIND: tl.constexpr):
    """(divergence at q's end, derivative g by p) of each entry, from log-probabilities."""
    if KIND == 1:
        return tl.zeros_like(p), _gap(tl.exp(p), p, q)
    # log(beta exp(q) + (1 - beta) exp(p)), whichever is larger in front.
    a, b = q + log_beta, p + log_rest
    high = tl.maximum(a, b)
    m = high + tl.log(tl.exp(a - high) + tl.exp(b - high))
    mass_q = tl.exp(q)
    return mass_q * _gap(mass_q, q, m), _gap(tl.exp(p), p, m)


@triton.jit
def kd_loss_kernel(
    student_ptr,
    teacher_ptr,
    labels_ptr,
    counts_ptr,
    ce_ptr,
    kd_ptr,
    V,
    stride_s,
    stride_t,
    alpha,
    temperature,
    beta,
    log_beta,
    log_rest,
    HAS_TEACHER: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s_ptr = student_ptr + row * stride_s
    t_ptr = teacher_ptr + row * stride_t
    counts = tl.load(counts_ptr + row).to(tl.float32)
    offs = tl.arange(0, BLOCK_V)
    low = float("-inf")
    # Maxima of the logits as they are: divided by a small temperature they may pass float32's range.
    top1, top_p, top_q = low, low, low
    sum1, sum_p, sum_q = 0.0, 0.0, 0.0
    for start in range(0, V, BLOCK_V):
        mask = start + offs < V
        s = tl.load(s_ptr + start + offs, mask=mask, other=low).to(tl.float32)
        if HAS_LABELS:
            top1, sum1 = _rescale(top1, sum1, s, 1.0)
        if HAS_TEACHER:
            t = tl.load(t_ptr + start + offs, mask=mask, other=low).to(tl.float32)
            top_p, sum_p = _rescale(top_p, sum_p, s, temperature)
            top_q, sum_q = _rescale(top_q, sum_q, t, temperature)
    # Normalisers stay in two parts: their sum would round away bits of every log-probability.
    log1, log_p, log_q = 0.0, 0.0, 0.0
    label = 0
    if HAS_LABELS:
        log1 = tl.log(sum1)
        label = tl.load(labels_ptr + row)
        # A row that does not count may hold any label.
        at = tl.load(s_ptr + label, mask=counts > 0, other=0.0).to(tl.float32)
        tl.store(ce_ptr + row, tl.where(counts > 0, (top1 - at) + log1, 0.0))
    mean, kd = 0.0, 0.0
    if HAS_TEACHER:
        log_p = tl.log(sum_p)
        log_q = tl.log(sum_q)
        if KIND != 0:
            for start in range(0, V, BLOCK_V):
                mask = start + offs < V
                s = tl.load(s_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
                t = tl.load(t_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
                p, q = (s - top_p) / temperature - log_p, (t - top_q) / temperature - log_q
                forward, slope = _terms(p, q, log_beta, log_rest, KIND)
                mean += tl.sum(tl.where(mask, tl.exp(p) * slope, 0.0), 0)
                kd += tl.sum(tl.where(mask, forward, 0.0), 0)
            kd = mean if KIND == 1 else beta * kd + (1.0 - beta) * mean
    for start in range(0, V, BLOCK_V):
        mask = start + offs < V
        s = tl.load(s_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.zeros((BLOCK_V,), tl.float32)
        if HAS_LABELS:
            hit = (start + offs == label).to(tl.float32)
            gradient += (1.0 - alpha) * (tl.exp((s - top1) - log1) - hit)
        if HAS_TEACHER:
            t = tl.load(t_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
            p, q = (s - top_p) / temperature - log_p, (t - top_q) / temperature - log_q
            if KIND == 0:
                mass = tl.exp(q)
                kd += tl.sum(tl.where(mask, mass * _gap(mass, q, p), 0.0), 0)
                slope = tl.exp(p) - mass
            else:
                _, slope = _terms(p, q, log_beta, log_rest, KIND)
                slope = (slope - mean) * tl.exp(p)
                if KIND == 2:
                    slope *= 1.0 - beta
            gradient += tl.where(alpha > 0.0, alpha * temperature * slope, 0.0)
        gradient = tl.where(counts > 0, gradient, 0.0)
        tl.store(s_ptr + start + offs, gradient.to(student_ptr.dtype.element_ty), mask=mask)
    if HAS_TEACHER:
        tl.store(kd_ptr + row, tl.where(counts > 0, kd, 0.0))


def launch(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor | None,
    counts: torch.Tensor,
    alpha: float,
    temperature: float,
    divergence: str,
    beta: float,
    sums: torch.Tensor,
) -> None:
    """Overwrite student's logits by their gradient, each row's ce and kd into sums [2, C]."""
    rows, V = student.shape
    logs = (math.log(beta), math.log(1 - beta)) if divergence == "jsd" else (0.0, 0.0)
    with on_device(student):
        kd_loss_kernel[(rows,)](
            student,
            student if teacher is None else teacher,
            counts if labels is None else labels,
            counts,
            sums[0],
            sums[1],
            V,
            student.stride(0),
            0 if teacher is None else teacher.stride(0),
            alpha,
            temperature,
            beta,
            *logs,
            HAS_TEACHER=teacher is not None,
            HAS_LABELS=labels is not None,
            KIND=DIVERGENCES[divergence],
            BLOCK_V=min(BLOCK_V, triton.next_power_of_2(V)),
            num_warps=8,
        )
