"""kd_loss: cross-entropy plus a divergence from a teacher, straight from hidden states and heads.

    s = hidden @ headᵀ, t = teacher_hidden @ teacher_headᵀ (or given)
    loss = (1 - alpha) ce(s, labels) + alpha T^2 D(softmax(t / T), softmax(s / T)), mean over tokens

Logits exist for a few tokens at a time: the gradients by hidden and head are formed in the same pass,
as the forward pass of a linear cross-entropy in chunks does (Liger-Kernel, arXiv 2410.10989), so that
the memory is that of a chunk and of the head's gradient, whatever the number of tokens. The formulas
are in `llmkern.reference.kd_loss`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkern import _backends
from llmkern._backends import Backend
from llmkern._dtypes import FLOATS
from llmkern.ops._library import LIBRARY, expect, register
from llmkern.reference.kd_loss import DIVERGENCES, kd_rows, weighted

SCHEMA = (
    "kd_loss(Tensor hidden, Tensor head, Tensor? labels, Tensor? teacher_logits, "
    "Tensor? teacher_hidden, Tensor? teacher_head, float alpha, float temperature, str divergence, "
    "float beta, int ignore_index, float? num_items, bool need_hidden, bool need_head) "
    "-> (Tensor loss, Tensor ce, Tensor kd, Tensor grad_hidden, Tensor grad_head)"
)

# Elements of the logits of one chunk.
_CHUNK = {"cpu": 1 << 22, "cuda": 1 << 26}

_Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class KdLoss(NamedTuple):
    """What `kd_loss` returns, scalars in float32 (float64 for float64 inputs).

    Attributes:
        loss: (1 - alpha) ce + alpha T^2 kd; the one to call backward on.
        ce: mean cross-entropy in nats; 0 without labels.
        kd: mean divergence in nats, without T^2; 0 without a teacher. Neither carries a gradient.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor


def _launch_rows(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    counts: Tensor,
    alpha: float,
    temperature: float,
    divergence: str,
    beta: float,
    sums: Tensor,
) -> None:
    ce, kd = kd_rows(student, teacher, labels, counts, alpha, temperature, divergence, beta)
    sums.zero_()
    sums[0, :1], sums[1, :1] = ce, kd


def _refuse_triton(student: Tensor, *args: object) -> str | None:
    if student.dtype == torch.float64:
        return "float64 logits"
    return _backends.refuse_triton(student.device)


def _launch_triton(*args: Any) -> None:
    from llmkern.triton_kernels.kd_loss import launch

    launch(*args)


def _refuse_cpu(student: Tensor, *args: object) -> str | None:
    return None if student.device.type == "cpu" else f"tensors are on {student.device.type}"


# On the CPU the chunks are small enough for torch's own passes to stay in cache.
BACKENDS = (
    Backend("triton", _refuse_triton, _launch_triton),
    Backend("cpu", _refuse_cpu, _launch_rows),
    Backend("reference", _backends.never_refuse, _launch_rows),
)


class _Call(NamedTuple):
    hidden: Tensor
    head: Tensor
    labels: Tensor | None
    teacher_logits: Tensor | None
    teacher_hidden: Tensor | None
    teacher_head: Tensor | None
    alpha: float
    temperature: float
    divergence: str
    beta: float
    ignore_index: int
    num_items: float | None
    need_hidden: bool
    need_head: bool


def _check(call: _Call) -> None:
    hidden, head, labels, *_ = call
    teacher_hidden, teacher_head = call.teacher_hidden, call.teacher_head
    teacher_logits, alpha = call.teacher_logits, call.alpha
    op, dtypes = "kd_loss", (*FLOATS, torch.float64)
    expect(hidden.dim() == 2 and hidden.dtype in dtypes, op, "hidden", hidden, "float [T, D]")
    T, D = hidden.shape
    fits = head.dim() == 2 and head.shape[1] == D and head.dtype == hidden.dtype
    expect(fits, op, "head", head, f"{hidden.dtype} [V, {D}]")
    V = head.shape[0]
    if labels is not None:
        fits = labels.dtype == torch.int64 and tuple(labels.shape) == (T,)
        expect(fits, op, "labels", labels, f"int64 [{T}]")
    if not 0 <= alpha <= 1:
        raise ValueError(f"{op}: alpha: got {alpha}, expected a weight in [0, 1]")
    if alpha < 1 and labels is None:
        raise ValueError(f"{op}: labels: got None with alpha = {alpha}, expected int64 [{T}]")
    if not call.temperature > 0:
        raise ValueError(f"{op}: temperature: got {call.temperature}, expected a positive number")
    if call.divergence not in DIVERGENCES:
        raise ValueError(
            f"{op}: divergence: got {call.divergence!r}, expected one of {DIVERGENCES}"
        )
    if call.divergence == "jsd" and not 0 < call.beta < 1:
        raise ValueError(f"{op}: beta: got {call.beta}, expected a weight in (0, 1)")
    if call.num_items is not None and not call.num_items > 0:
        raise ValueError(f"{op}: num_items: got {call.num_items}, expected a positive number")
    if (teacher_hidden is None) != (teacher_head is None):
        raise ValueError(f"{op}: teacher_hidden, teacher_head: got only one of them, expected both")
    teachers = (teacher_logits is not None) + (teacher_hidden is not None)
    if teachers > 1 or (alpha > 0 and not teachers):
        raise ValueError(
            f"{op}: teacher_logits, teacher_hidden: got {('neither', '', 'both')[teachers]} with "
            f"alpha = {alpha}, expected one of them"
        )
    if teacher_logits is not None:
        fits = tuple(teacher_logits.shape) == (T, V) and teacher_logits.dtype in dtypes
        expect(fits, op, "teacher_logits", teacher_logits, f"float [{T}, {V}], one vocabulary")
    if teacher_hidden is not None and teacher_head is not None:
        fits = teacher_hidden.dim() == 2 and len(teacher_hidden) == T
        expect(fits, op, "teacher_hidden", teacher_hidden, f"float [{T}, D of the teacher]")
        shape, kind = (V, teacher_hidden.shape[1]), teacher_hidden.dtype
        fits = tuple(teacher_head.shape) == shape and teacher_head.dtype == kind
        expect(fits, op, "teacher_head", teacher_head, f"{kind} {list(shape)}, one vocabulary")
    others = (head, labels, teacher_logits, teacher_hidden, teacher_head)
    for tensor in others:
        if tensor is not None and tensor.device != hidden.device:
            expect(False, op, "tensors", tensor, f"all on the device of hidden, {hidden.device}")


def _check_labels(labels: Tensor | None, V: int, ignore_index: int) -> None:
    """What labels hold; on the CPU only, because looking at a GPU tensor would stall its queue."""
    if labels is None or labels.device.type != "cpu" or not labels.numel():
        return
    bad = labels[(labels != ignore_index) & ((labels < 0) | (labels >= V))]
    if bad.numel():
        raise ValueError(
            f"kd_loss: labels: got {int(bad[0])}, expected 0 to {V - 1} or {ignore_index}"
        )


def _fake(*arguments: Any) -> _Five:
    call = _Call(*arguments)
    _check(call)
    hidden, head = call.hidden, call.head
    work = torch.promote_types(hidden.dtype, torch.float32)
    loss, ce, kd = (hidden.new_empty((), dtype=work) for _ in range(3))
    grad_hidden = hidden.new_empty(hidden.shape if call.need_hidden else 0)
    return loss, ce, kd, grad_hidden, head.new_empty(head.shape if call.need_head else 0)


def _run(*arguments: Any) -> _Five:
    call = _Call(*arguments)
    outputs = _fake(*call)
    loss, ce, kd, grad_hidden, grad_head = outputs
    hidden, head, labels, teacher_logits, *_ = call
    rule = (call.alpha, call.temperature, call.divergence, call.beta)
    T, V = len(hidden), len(head)
    _check_labels(labels, V, call.ignore_index)
    counts = hidden.new_ones(T, dtype=torch.bool) if labels is None else labels != call.ignore_index
    if call.num_items is None:
        scale = 1 / counts.sum().clamp(min=1).to(loss.dtype)
    else:
        scale = torch.full_like(loss, 1 / call.num_items)
    # Chunks add up in float32: a sum kept in 16 bits would lose the later ones.
    head_sum = torch.zeros_like(head, dtype=loss.dtype) if call.need_head else None
    total = hidden.new_zeros(2, dtype=loss.dtype)
    rows = max(1, _CHUNK[hidden.device.type] // max(V, 1))
    for start in range(0, T, rows):
        part = slice(start, start + rows)
        logits = hidden[part] @ head.t()
        target = None if teacher_logits is None else teacher_logits[part]
        if call.teacher_hidden is not None and call.teacher_head is not None:
            target = call.teacher_hidden[part] @ call.teacher_head.t()
        sums = total.new_empty(2, len(logits)).zero_()
        own = None if labels is None else labels[part]
        args = (logits, target, own, counts[part], *rule, sums)
        _backends.choose("kd_loss", BACKENDS, *args).launch(*args)
        total += sums.sum(1)
        if call.need_hidden:
            torch.mm(logits, head, out=grad_hidden[part])
        if head_sum is not None:
            if head_sum.dtype == logits.dtype:
                head_sum.addmm_(logits.t(), hidden[part])
            else:
                head_sum += logits.t() @ hidden[part]
    torch.mul(total[0], scale, out=ce)
    torch.mul(total[1], scale, out=kd)
    loss.copy_(weighted(ce, kd, call.alpha, call.temperature))
    if call.need_hidden:
        grad_hidden *= scale.to(grad_hidden.dtype)
    if head_sum is not None:
        grad_head.copy_(head_sum.mul_(scale))
    return outputs


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Five) -> None:
    _loss, ce, kd, grad_hidden, grad_head = output
    ctx.mark_non_differentiable(ce, kd, grad_hidden, grad_head)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_hidden, grad_head)


def _backward(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * len(_Call._fields)
    if grad is not None:
        for i, saved in enumerate(ctx.saved_tensors):
            if ctx.needs_input_grad[i]:
                grads[i] = saved * grad.to(saved.dtype)
    return tuple(grads)


_op = register(SCHEMA, _run, _fake)
torch.library.register_autograd(
    "llmkern::kd_loss", _backward, setup_context=_setup_context, lib=LIBRARY
)


def kd_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor | None = None,
    *,
    teacher_logits: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    alpha: float = 0.5,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    ignore_index: int = -100,
    num_items: float | None = None,
) -> KdLoss:
    """Distillation loss of a student from its hidden states, logits never held for all tokens.

    Differentiable once, in hidden and head; the gradients are computed in the forward pass. Logits of
    -inf mask tokens of a vocabulary; what else is not finite shows in the result where its row counts.

    Args:
        hidden: float32, bfloat16, float16 or float64 [..., D]: what enters the student's head, one row
            per prediction (the caller has dropped each window's last position).
        head: [V, D] in hidden's dtype.
        labels: int64 [...], the token that each row predicts, `ignore_index` where the row does not
            count; may be None if alpha is 1.
        teacher_logits: float [..., V], or
        teacher_hidden, teacher_head: float [..., D'] and [V, D'], of which logits are made as they
            are needed. Neither gets a gradient. May be missing if alpha is 0.
        alpha: weight of the divergence, in [0, 1]; the cross-entropy has 1 - alpha.
        temperature: T of both softmaxes in the divergence, which is multiplied by T^2.
        divergence: "forward_kl" (Hinton), "reverse_kl" (MiniLLM) or "jsd" (GKD).
        beta: of "jsd", in (0, 1): towards 0 like forward, towards 1 like reverse KL.
        ignore_index: label of rows that do not count.
        num_items: what to divide the sums by; by default the number of rows that count (0 of them give
            a loss of 0). Gradient accumulation passes the number in the whole step.

    Returns:
        `KdLoss`.

    Raises:
        ValueError: an argument's dtype, shape, device or value is not as above.
        NotImplementedError: a backend was forced that cannot serve the call.

    Source: Hinton et al. 2015, arXiv 1503.02531; Gu et al. 2023, arXiv 2306.08543; Agarwal et al. 2023,
    arXiv 2306.13649; chunks with gradients as in Hsu et al. 2024, arXiv 2410.10989.
    """

    def flat(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().reshape(-1, t.shape[-1])

    grads = torch.is_grad_enabled()
    loss, ce, kd, *_ = _op(
        hidden.reshape(-1, hidden.shape[-1]),
        head,
        None if labels is None else labels.reshape(-1),
        flat(teacher_logits),
        flat(teacher_hidden),
        None if teacher_head is None else teacher_head.detach(),
        alpha,
        temperature,
        divergence,
        beta,
        ignore_index,
        num_items,
        grads and hidden.requires_grad,
        grads and head.requires_grad,
    )
    return KdLoss(loss, ce, kd)
