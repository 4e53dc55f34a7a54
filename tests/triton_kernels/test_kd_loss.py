"""The Triton kernel of kd_loss; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import sys

import pytest
import torch
from llmkern.triton_kernels import kd_loss as kernels

import llmkern
from llmkern.ops import kd_loss
from llmkern.reference.kd_loss import DIVERGENCES, kd_rows
from llmkern.testing import assert_matches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SETTINGS = [(d, b) for d in DIVERGENCES for b in ((0.5, 0.1) if d == "jsd" else (0.5,))]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("divergence", "beta"), SETTINGS)
@pytest.mark.parametrize(
    ("rows", "V", "block"),
    [pytest.param(3, 70, 32, id="v_tail"), pytest.param(2, 64, 64, id="one_block")],
)
def test_rows_match_float64(rows, V, block, divergence, beta, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK_V", block)
    student = (3 * torch.randn(rows, V, device=DEVICE)).to(dtype)
    teacher = (3 * torch.randn(rows, V, device=DEVICE)).to(dtype)
    labels = torch.randint(0, V, (rows,), device=DEVICE)
    labels[-1] = -100
    rest = (labels, labels != -100, 0.3, 1.7, divergence, beta)
    exact, like = student.double(), student.clone()
    want = torch.stack(kd_rows(exact, teacher.double(), *rest))
    torch_sums = torch.stack(kd_rows(like, teacher, *rest))
    sums = torch.full((2, rows), float("nan"), device=DEVICE)
    kernels.launch(student, teacher, *rest, sums)
    assert_matches(student, exact, like)
    assert_matches(sums.sum(1), want, torch_sums, slack=4.0)
    assert not student[-1].any()


@pytest.mark.parametrize("teacher", [True, False], ids=["no_labels", "no_teacher"])
def test_either_part_alone(teacher):
    V = 50
    student = torch.randn(4, V, device=DEVICE)
    target = torch.randn(4, V, device=DEVICE) if teacher else None
    labels = None if teacher else torch.randint(0, V, (4,), device=DEVICE)
    rest = (target, labels, torch.ones(4, dtype=torch.bool, device=DEVICE))
    options = (1.0 if teacher else 0.0, 2.0, "reverse_kl", 0.5)
    like, exact = student.clone(), student.double()
    kd_rows(like, *rest, *options)
    kd_rows(exact, *rest, *options)
    kernels.launch(student, *rest, *options, torch.zeros(2, 4, device=DEVICE))
    assert_matches(student, exact, like)


def test_the_op_goes_through_it_in_chunks(monkeypatch):
    monkeypatch.setattr(sys.modules["llmkern.ops.kd_loss"], "_CHUNK", {DEVICE: 3 * 40})
    hidden = torch.randn(8, 16, device=DEVICE, requires_grad=True)
    head = torch.randn(40, 16, device=DEVICE, requires_grad=True)
    labels = torch.randint(0, 40, (8,), device=DEVICE)
    teacher = torch.randn(8, 40, device=DEVICE)
    results = []
    for backend in ("triton", "reference"):
        with llmkern.use_backend(backend):
            out = kd_loss(hidden, head, labels, teacher_logits=teacher, temperature=2.0)
        results.append((*out, *torch.autograd.grad(out.loss, (hidden, head))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
