"""kd_loss against autograd of the plain formula, and against finite differences."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import llmkern
from llmkern.ops import kd_loss
from llmkern.reference.kd_loss import DIVERGENCES
from llmkern.reference.kd_loss import kd_loss as plain
from llmkern.testing import assert_matches

module = sys.modules["llmkern.ops.kd_loss"]
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def make(T: int, D: int, V: int, dtype: torch.dtype = F64) -> dict[str, Tensor]:
    labels = torch.randint(0, V, (T,))
    labels[::3] = -100
    return {
        "hidden": torch.randn(T, D, dtype=dtype, requires_grad=True),
        "head": (torch.randn(V, D) / D**0.5).to(dtype).requires_grad_(),
        "labels": labels,
        "teacher_hidden": torch.randn(T, D + 1, dtype=dtype),
        "teacher_head": (2 * torch.randn(V, D + 1) / D**0.5).to(dtype),
    }


def spec(t: dict[str, Tensor], work: torch.dtype | None = None, **options):
    """Loss and gradients by autograd of the plain formula, in `work`."""
    t = {k: v.detach().to(work) if work and v.is_floating_point() else v for k, v in t.items()}
    hidden, head = t["hidden"].detach().requires_grad_(), t["head"].detach().requires_grad_()
    teacher = t["teacher_hidden"] @ t["teacher_head"].t()
    logits = hidden @ head.t()
    if logits.dtype in (BF16, F16):
        logits, teacher = logits.float(), teacher.float()
    out = plain(logits, teacher, t["labels"], **options)
    out[0].backward()
    return (*(o.detach() for o in out), hidden.grad, head.grad)


OPTIONS = [
    {"alpha": alpha, "temperature": temperature, "divergence": divergence, "beta": beta}
    for divergence, beta in (("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1))
    for alpha, temperature in ((0.5, 2.0), (1.0, 1.0))
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_matches_autograd_of_the_formula_in_chunks(options, dtype, monkeypatch):
    t = make(23, 8, 37, dtype)
    monkeypatch.setattr(module, "_CHUNK", {"cpu": 5 * 37})
    got = kd_loss(**t, **options)
    got.loss.backward()
    exact = spec(t, F64, **options)
    # Plain torch in bfloat16 or float16 rounds no more than these: logits once, gradients once.
    like = spec(t, **options)
    work = torch.promote_types(dtype, F32)
    for value, want, other in zip(
        (*got, t["hidden"].grad, t["head"].grad), exact, like, strict=True
    ):
        out = value.detach()
        if dtype == F64:
            torch.testing.assert_close(out, want)
        else:
            assert out.dtype == (dtype if out.dim() else work)
            assert_matches(out, want, other.to(out.dtype), slack=4.0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_match_finite_differences(divergence):
    t = make(5, 3, 7)

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        rest = {k: v for k, v in t.items() if k not in ("hidden", "head")}
        return kd_loss(
            hidden, head, **rest, alpha=0.3, temperature=1.7, divergence=divergence, beta=0.3
        ).loss

    assert torch.autograd.gradcheck(loss, (t["hidden"], t["head"]))


@settings(max_examples=25, deadline=None)
@given(
    T=st.integers(1, 9),
    V=st.integers(2, 11),
    alpha=st.floats(0, 1),
    temperature=st.floats(0.25, 8),
    divergence=st.sampled_from(DIVERGENCES),
    beta=st.floats(0.05, 0.95),
    chunk=st.integers(1, 40),
)
def test_any_shape_and_setting(T, V, alpha, temperature, divergence, beta, chunk):
    options = {
        "alpha": alpha,
        "temperature": temperature,
        "divergence": divergence,
        "beta": beta,
    }
    t = make(T, 4, V)
    before = module._CHUNK
    module._CHUNK = {"cpu": chunk}
    try:
        got = kd_loss(**t, **options)
    finally:
        module._CHUNK = before
    got.loss.backward()
    want = spec(t, **options)
    for a, b in zip((*got, t["hidden"].grad, t["head"].grad), want, strict=True):
        torch.testing.assert_close(a.detach(), b)


def test_logits_of_the_teacher_serve_as_well_as_its_hidden_states():
    t = make(6, 4, 9)
    want = kd_loss(**t).loss
    t["teacher_logits"] = t.pop("teacher_hidden") @ t.pop("teacher_head").t()
    assert torch.equal(kd_loss(**t).loss, want)


def test_equal_models_do_not_diverge():
    t = make(6, 4, 9)
    t["teacher_hidden"], t["teacher_head"] = t["hidden"].detach(), t["head"].detach()
    for divergence in DIVERGENCES:
        assert abs(kd_loss(**t, divergence=divergence).kd.item()) < 1e-12


def test_without_a_teacher_it_is_the_cross_entropy():
    t = make(6, 4, 9)
    got = kd_loss(t["hidden"], t["head"], t["labels"], alpha=0.0)
    logits = t["hidden"] @ t["head"].t()
    torch.testing.assert_close(got.loss, torch.nn.functional.cross_entropy(logits, t["labels"]))
    assert got.kd == 0


def test_rows_that_do_not_count_leave_no_trace():
    t = make(9, 4, 7)
    got = kd_loss(**t)
    got.loss.backward()
    assert not t["hidden"].grad[t["labels"] == -100].any()
    t["labels"].fill_(-100)
    assert kd_loss(**t).loss == 0


def test_num_items_divides_the_sums_of_a_micro_batch():
    t = make(9, 4, 7)
    whole = kd_loss(**t).loss
    count = int((t["labels"] != -100).sum())
    rows = ("hidden", "labels", "teacher_hidden")
    parts = [
        kd_loss(**{k: v[part] if k in rows else v for k, v in t.items()}, num_items=count).loss
        for part in (slice(0, 4), slice(4, 9))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_leading_dimensions_and_a_frozen_head():
    t = make(12, 4, 7)
    want = kd_loss(**t)
    want.loss.backward()
    hidden = t["hidden"].detach().view(3, 4, 4).requires_grad_()
    got = kd_loss(
        hidden,
        t["head"].detach(),
        t["labels"].view(3, 4),
        teacher_hidden=t["teacher_hidden"].view(3, 4, 5),
        teacher_head=t["teacher_head"],
    )
    (3 * got.loss).backward()
    assert torch.equal(got.loss, want.loss)
    torch.testing.assert_close(hidden.grad.view(12, 4), 3 * t["hidden"].grad)


@pytest.mark.parametrize("teacher", ["hidden", "logits", "none"])
def test_opcheck(teacher):
    t = make(5, 4, 7, F32)
    args = [t["hidden"], t["head"], t["labels"], None, t["teacher_hidden"], t["teacher_head"], 0.5]
    if teacher != "hidden":
        args[3:6] = [torch.randn(5, 7) if teacher == "logits" else None, None, None]
    if teacher == "none":
        args[6] = 0.0
    args += [2.0, "reverse_kl", 0.5, -100, None, True, True]
    torch.library.opcheck(torch.ops.llmkern.kd_loss.default, tuple(args))


def test_compiles_without_a_break():
    t = make(8, 4, 7, F32)

    def loss(hidden: Tensor) -> Tensor:
        return kd_loss(**{**t, "hidden": 2 * hidden}).loss

    hidden = torch.randn(8, 4, requires_grad=True)
    want = loss(hidden)
    want.backward()
    wanted = hidden.grad.clone()
    hidden.grad = None
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden)
    got.backward()
    assert torch.equal(got, want)
    assert torch.equal(hidden.grad, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 1.5}, r"alpha: got 1.5, expected a weight in \[0, 1\]"),
        ({"labels": None}, "labels: got None with alpha = 0.5"),
        ({"labels": torch.full((6,), 9)}, "labels: got 9, expected 0 to 8 or -100"),
        ({"labels": torch.zeros(6)}, r"labels: got float32 \[6\] on cpu, expected int64 \[6\]"),
        ({"temperature": 0.0}, "temperature: got 0.0, expected a positive number"),
        ({"divergence": "kl"}, "divergence: got 'kl', expected one of"),
        ({"divergence": "jsd", "beta": 1.0}, r"beta: got 1.0, expected a weight in \(0, 1\)"),
        ({"teacher_head": None}, "got only one of them"),
        ({"teacher_logits": torch.zeros(6, 9)}, "got both with alpha"),
        ({"teacher_hidden": None, "teacher_head": None}, "got neither with alpha = 0.5"),
        ({"teacher_head": torch.zeros(8, 5, dtype=F64)}, "teacher_head: got float64"),
        ({"head": torch.zeros(9, 4)}, r"head: got float32 \[9, 4\] on cpu, expected torch.float64"),
        ({"num_items": 0.0}, "num_items: got 0.0, expected a positive number"),
    ],
    ids=lambda v: None if isinstance(v, dict) else v[:24],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        kd_loss(**{**make(6, 4, 9), **change})


def test_a_backend_that_is_not_there_says_so():
    with llmkern.use_backend("cuda"), pytest.raises(NotImplementedError, match="no cuda impl"):
        kd_loss(**make(6, 4, 9))
