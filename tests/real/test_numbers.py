"""Numbers that real models hold: masked and padded vocabularies, overflows, capped and scaled heads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny
from torch import Tensor
from typer.testing import CliRunner

from llmkern.cli import build_app
from llmkern.evaluate import score_logits
from llmkern.ops.kd_loss import BACKENDS
from llmkern.pipeline import Pipeline, Quantize
from llmkern.pipeline.compare import compare
from llmkern.reference.kd_loss import DIVERGENCES
from llmkern.reference.kd_loss import kd_loss as specification
from llmkern.report import PipelineReport, write_report

INF, NAN = float("inf"), float("nan")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
V, T, BETA = 16, 1.7, 0.3
TOKENS = torch.arange(4 * 16).view(4, 16) % 96


def by_hand(s: list[float], t: list[float], divergence: str, T: float = T) -> float:
    """The divergence of one row, entry by entry, in Python's float64."""

    def logs(row: list[float]) -> list[float]:
        top = max(row)
        total = math.log(sum(math.exp((x - top) / T) for x in row))
        return [(x - top) / T - total for x in row]

    def kl(a: list[float], b: list[float]) -> float:
        entries = zip(a, b, strict=True)
        return sum(math.exp(x) * (x - y) for x, y in entries if math.exp(x) > 0)

    p, q = logs(s), logs(t)
    if divergence == "forward_kl":
        return kl(q, p)
    if divergence == "reverse_kl":
        return kl(p, q)
    mass = [BETA * math.exp(y) + (1 - BETA) * math.exp(x) for x, y in zip(p, q, strict=True)]
    m = [math.log(x) if x else 0.0 for x in mass]
    return BETA * kl(q, m) + (1 - BETA) * kl(p, m)


def logits(scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return scale * torch.randn(2, 3, V, generator=generator, dtype=F64)


def masked(tensor: Tensor, *tokens: int) -> Tensor:
    return tensor.index_fill(-1, torch.tensor(tokens), -INF)


# student, teacher [3, 16]
MASKED = {
    "teacher": (logits()[0], masked(logits()[1], 3, 7, 12)),
    "teacher_but_one": (logits()[0], masked(logits()[1], *range(1, V))),
    "student": (masked(logits()[0], 3, 7, 12), logits()[1]),
    "both_the_same": (masked(logits()[0], 3, 7, 12), masked(logits()[1], 3, 7, 12)),
    "student_within_the_teacher's": (masked(logits()[0], 3), masked(logits()[1], 3, 7, 12)),
    "each_its_own": (masked(logits()[0], 3), masked(logits()[1], 7)),
    "large": (logits(3e4)[0], masked(logits(3e4)[1], 3, 7, 12)),
}


LAUNCH = {backend.name: backend.launch for backend in BACKENDS}


def rows(
    backend: str,
    student: Tensor,
    teacher: Tensor,
    divergence: str,
    *,
    labels: Tensor | None = None,
    alpha: float = 1.0,
    temperature: float = T,
) -> tuple[Tensor, Tensor, Tensor]:
    """(ce, kd, gradient by the student's logits) of a few rows, by a backend or by autograd."""
    counts = torch.ones(len(student), dtype=torch.bool) if labels is None else labels != -100
    if backend == "autograd":
        s = student.clone().requires_grad_()
        options = {"alpha": alpha, "temperature": temperature, "divergence": divergence}
        loss, ce, kd = specification(s, teacher, labels, beta=BETA, **options)
        number = counts.sum()
        return ce * number, kd * number, torch.autograd.grad(loss * number, s)[0]
    gradient, sums = student.clone(), torch.full((2, len(student)), NAN, dtype=F32)
    if student.dtype == F64:
        sums = sums.double()
    rest = (labels, counts, alpha, temperature, divergence, BETA, sums)
    LAUNCH[backend](gradient, teacher, *rest)
    return sums[0].sum(), sums[1].sum(), gradient


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("backend", ["autograd", "reference", "cpu", "triton"])
def test_a_masked_vocabulary_counts_for_nothing(backend: str, name: str, divergence: str) -> None:
    dtypes = [F32, BF16, F16] if backend in ("cpu", "triton") else [F64]
    for dtype in dtypes:
        student, teacher = (tensor.to(dtype) for tensor in MASKED[name])
        pairs = zip(student.tolist(), teacher.tolist(), strict=True)
        want = sum(by_hand(s, t, divergence) for s, t in pairs)
        _, kd, gradient = rows(backend, student, teacher, divergence)
        tolerance = 1e-9 if dtype == F64 else 1e-4
        torch.testing.assert_close(float(kd.detach()), want, rtol=tolerance, atol=tolerance)
        if math.isfinite(want):
            exact = rows("autograd", student.double(), teacher.double(), divergence)[2]
            assert bool(exact.isfinite().all())
            near = {F64: 1e-9, F32: 1e-5, BF16: 1e-2, F16: 1e-3}[dtype]
            torch.testing.assert_close(gradient.double(), exact, rtol=near, atol=near)


@pytest.mark.parametrize("backend", ["autograd", "reference", "cpu", "triton"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_gradient_at_a_mask_is_that_of_a_very_low_logit(backend: str, divergence: str) -> None:
    """Of the student's own -inf, and of the teacher's where the divergence is finite."""
    student, teacher = (tensor.float() for tensor in MASKED["both_the_same"])
    low = [tensor.masked_fill(tensor.isinf(), -1e4).double() for tensor in (student, teacher)]
    want = rows("autograd", *low, divergence)[2]
    torch.testing.assert_close(rows(backend, student, teacher, divergence)[2], want.float())


@pytest.mark.parametrize("backend", ["autograd", "reference", "cpu", "triton"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_without_a_distribution_are_nan_only_where_they_count(
    backend: str, divergence: str
) -> None:
    student, teacher = logits()[0].float(), logits()[1].float()
    labels = torch.tensor([4, -100, -100])
    want = rows(backend, student, teacher, divergence, labels=labels, alpha=0.5)
    for bad in (NAN, INF, -INF):
        for which in (0, 1):
            pair = [student.clone(), teacher.clone()]
            pair[which][1] = bad
            pair[which][2, 3] = NAN
            got = rows(backend, *pair, divergence, labels=labels, alpha=0.5)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b)
            pair[which][0] = bad
            got = rows(backend, *pair, divergence, labels=labels, alpha=0.5)
            assert bool(got[1].isnan())


@pytest.mark.parametrize("backend", ["autograd", "reference", "cpu", "triton"])
@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
def test_logits_near_the_end_of_the_range(backend: str, temperature: float) -> None:
    """Their differences and quotients overflow; each row is one token against one token."""
    student = torch.tensor([[-3e38, 3e38, -3.3e38], [3e38, -3e38, 0.0]])
    for divergence in DIVERGENCES:
        _, kd, gradient = rows(backend, student, student, divergence, temperature=temperature)
        assert abs(float(kd.detach())) < 1e-6
        assert bool((gradient.abs() < 1e-6 * temperature).all())
    lowest = torch.full((1, 8), -3.3e38)
    _, kd, gradient = rows(backend, lowest, lowest + 0, "jsd", temperature=temperature)
    assert abs(float(kd.detach())) < 1e-6
    assert bool((gradient.abs() < 1e-6 * temperature).all())


@pytest.mark.parametrize("backend", ["autograd", "reference", "cpu", "triton"])
def test_what_has_no_weight_may_be_infinite(backend: str) -> None:
    student, teacher = (tensor.float() for tensor in MASKED["student"])
    labels = torch.tensor([3, 1, 2])  # of probability 0
    ce, _, gradient = rows(backend, student, teacher, "jsd", labels=labels, alpha=1.0)
    assert float(ce) == INF
    assert bool(gradient.isfinite().all())
    _, kd, gradient = rows(backend, student, teacher, "forward_kl", labels=labels, alpha=0.0)
    assert float(kd) == INF
    assert bool(gradient.isfinite().all())


def test_evaluation_with_masked_tokens() -> None:
    tokens = torch.tensor([[0, 1, 2, 4]])
    for name, (student, teacher) in MASKED.items():
        pairs = list(zip(student.tolist(), teacher.tolist(), strict=True))
        want = sum(by_hand(s, t, "forward_kl", 1.0) for s, t in pairs)
        _, kl, agreed = score_logits(student, tokens, teacher).tolist()
        assert kl == pytest.approx(want, rel=1e-5), name
        assert agreed == sum(s.index(max(s)) == t.index(max(t)) for s, t in pairs), name


def strict(path: Path) -> Any:
    """A JSON file, read as parsers do that know no NaN and no Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path}: {constant}")

    return json.loads(path.read_text(), parse_constant=refuse)


def evaluations(report: PipelineReport) -> str:
    """As text, in which NaN equals itself."""
    return repr([(record.evaluation, record.sensitivity) for record in report.stages])


def broken_model(value: float) -> Any:
    """Logits of `value` times a random number."""
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.mul_(value)
    return model


# scale of the head -> what its perplexity is
BROKEN = {"overflows": (1e6, INF), "nan": (NAN, NAN)}


@pytest.mark.parametrize("name", BROKEN)
def test_a_pipeline_goes_on_with_a_broken_model(name: str, tmp_path: Path) -> None:
    scale, perplexity = BROKEN[name]
    broken_model(scale).save_pretrained(tmp_path / "model")
    run = {"calibration": TOKENS, "evaluation": TOKENS[:2], "speed": False}
    stages = [Quantize("rtn", group_size=32)]
    out = tmp_path / "out"
    report = Pipeline(stages).run(tmp_path / "model", out, **run)
    for record in report.stages:
        assert str(record.evaluation["perplexity"]) == str(perplexity)
    for path in out.rglob("*.json"):
        strict(path)
    read = PipelineReport.from_dict(strict(out / "report.json"))
    assert evaluations(read) == evaluations(report)
    for gone in ("report.json", "report.md"):
        (out / gone).unlink()
    again = Pipeline(stages).run(tmp_path / "model", out, resume=True, **run)
    assert evaluations(again) == evaluations(report)
    assert str(perplexity) in (out / "report.md").read_text()


@pytest.mark.parametrize("name", BROKEN)
def test_a_comparison_and_an_evaluation_of_a_broken_model(name: str, tmp_path: Path) -> None:
    scale, perplexity = BROKEN[name]
    model = broken_model(scale)
    report = compare(
        model, methods=["rtn 4-bit"], calibration=TOKENS, evaluation=TOKENS[:2], speed=False
    )
    write_report(report, tmp_path)
    assert len(report.stages) == 2
    assert strict(tmp_path / "report.json")["stages"][1]["evaluation"]["perplexity"] in (
        "Infinity",
        "NaN",
    )
    model.save_pretrained(tmp_path / "model")
    save_file({"input_ids": TOKENS[:2]}, tmp_path / "tokens.safetensors")
    arguments = ["eval", str(tmp_path / "model"), "--tokens", str(tmp_path / "tokens.safetensors")]
    result = CliRunner().invoke(build_app(), [*arguments, "--json", str(tmp_path / "eval.json")])
    assert result.exit_code == 0, result.output
    assert str(perplexity) in result.output
    assert float(strict(tmp_path / "eval.json")["perplexity"]) != 0
