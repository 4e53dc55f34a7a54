"""What the benchmarks compute from times and sizes: rings, plans of visits, ratios, merged records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import _gpu
import _report
import harness
import matmul
import pytest
import torch
from harness import Case, Contender, Options, Peaks, Timing
from hypothesis import given
from hypothesis import strategies as st


@given(nbytes=st.integers(1, 1 << 30), ring=st.integers(1, 1 << 30))
def test_ring_is_as_large_as_asked_and_has_no_copy_too_many(nbytes, ring):
    number = harness.copies(nbytes, ring)
    assert number >= 2
    assert number * nbytes >= ring
    assert number == 2 or (number - 1) * nbytes < ring


@pytest.mark.parametrize("l2", [0, 40 << 20, 50 << 20, 126 << 20])
def test_gpu_ring_exceeds_the_l2(l2):
    assert _gpu.ring_bytes(l2) >= max(4 * l2, 200 << 20)


@given(copies=st.integers(1, 500), kernels=st.integers(1, 300))
def test_graph_goes_round_the_ring_and_hides_its_launch(copies, kernels):
    calls = _gpu.graph_calls(copies, kernels)
    assert calls % copies == 0
    assert calls * kernels >= _gpu.FEWEST_CALLS
    assert calls == copies or (calls - copies) * kernels < _gpu.FEWEST_CALLS


@pytest.mark.parametrize(
    ("name", "bandwidth"),
    [
        ("NVIDIA H200", 4.8e12),
        ("NVIDIA H100 PCIe", 2.0e12),
        ("NVIDIA H100 80GB HBM3", 3.35e12),
        ("NVIDIA A100-SXM4-80GB", 2.04e12),
    ],
)
def test_data_sheet_is_found_by_name(name, bandwidth):
    found = _gpu.specified(name)
    assert found is not None
    assert found[0] == bandwidth


def test_a_peer_that_raises_leaves_the_default_device(monkeypatch):
    def refuse(i):
        raise RuntimeError("not here")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    torch.set_default_device("meta")
    try:
        with pytest.raises(RuntimeError, match="not here"):
            _gpu._host_latency(Contender("peer", refuse, lambda out: None))
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("uuid", ["0a-1b", "GPU-0a-1b"])
def test_nvidia_smi_is_told_the_device_that_is_used(uuid, monkeypatch):
    properties = SimpleNamespace(uuid=uuid)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert _gpu.smi_index(0) == "GPU-0a-1b"


def test_data_sheet_of_an_unknown_device_is_absent():
    assert _gpu.specified("Tesla T4") is None


def test_clock_log_takes_medians_by_case_and_skips_what_is_no_number():
    log = _gpu.ClockLog()
    for line in ("1980, 2619, 300.5, 40", "[N/A], 2619, 1, 1", "1500, 2619, 500, 44", "", "1980"):
        log.add(line)
    log.add("1900, 2619, 400, 42")
    log.mark("a")
    log.mark("nothing came in")
    assert log.by_case == {
        "a": {"clocks.sm": 1900, "clocks.mem": 2619, "power.draw": 400.0, "temperature.gpu": 42}
    }
    assert "clocks.sm 1900–1900" in _report.clock_range(log.by_case)[0]


@given(once=st.floats(1e-6, 20), share=st.floats(1e-4, 2), rounds=st.integers(1, 40))
def test_visits_keep_to_the_share_and_are_never_too_few(once, share, rounds):
    calls, every = harness.visit_plan(once, share, rounds)
    assert calls >= 1
    assert calls * once <= max(1.5 * share, once)
    assert len(range(0, rounds, every)) >= min(rounds, harness.FEWEST_VISITS)


def test_job_without_a_budget_is_called_once_per_visit():
    assert harness.visit_plan(0.0, 0.0, 3) == (1, 1)


def test_floor_is_the_larger_of_memory_and_arithmetic():
    peaks = Peaks(1e9, {"bfloat16": 1e12})
    assert peaks.floor(Case("", [], bytes=2e9, flops=1e12)) == 2.0
    assert peaks.floor(Case("", [], bytes=2e9, flops=5e12)) == 5.0


def contender(name, calls, *, ours=False, result=1.0, error=None):
    def run(i):
        calls.append((name, i))
        if error:
            raise error
        return torch.tensor([result])

    return Contender(name, run, harness.close_to(torch.ones(1), 1e-3), ours)


def test_wrong_and_failing_contenders_get_no_number_and_the_others_take_turns():
    calls = []
    case = Case(
        "M=1",
        [
            contender("llmkern", calls, ours=True),
            contender("torch", calls),
            contender("wrong", calls, result=1.1),
            contender("broken", calls, error=TypeError("unexpected keyword\nsecond line")),
            harness.missing("absent", "No module named 'absent'"),
            contender("left out", calls),
        ],
        bytes=1,
        flops=1,
    )
    options = Options(rounds=4, seconds=0, skip=("left out",))
    timings = harness.measure(case, Peaks(1.0, {"bfloat16": 1.0}), options, "torch")
    problems = {t.contender: t.problem for t in timings}
    assert problems == {
        "llmkern": None,
        "torch": None,
        "wrong": "relative error 1.0e-01 > 1.0e-03",
        "broken": "TypeError: unexpected keyword",
        "absent": "No module named 'absent'",
    }
    timed = [name for name, i in calls if i >= 2]
    assert timed == ["llmkern", "torch"] * 4
    ours, other = timings[:2]
    assert ours.times_baseline == other.median / ours.median == ours.times_best_other
    assert ours.least <= ours.p20 <= ours.p80


def test_our_own_failure_is_not_reported_but_raised():
    case = Case("", [contender("llmkern", [], ours=True, error=TypeError("a bug"))], 1, 1)
    with pytest.raises(TypeError, match="a bug"):
        harness.measure(case, Peaks(1.0, {"bfloat16": 1.0}), Options(), "torch")


BENCH = Path(harness.__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(BENCH.parent), "TERM": "dumb", "COLUMNS": "100"}


def row(case, name, seconds, **more):
    timing = Timing(case, name, name == "llmkern", median=seconds, **more)
    timing.p20 = timing.p80 = timing.least = seconds
    timing.floor = 0.5
    return timing.__dict__


def record(commit, rows, gpu=None):
    run = {
        "cpu": "a CPU",
        "gpu": gpu,
        "threads": 2,
        "isa": "avx512",
        "commit": commit,
        "clocks": {},
    }
    run |= {"versions": {"torch": "2"}, "peaks": {"read_bytes_per_s": 1e9, "flops_per_s": {}}}
    return {"bench": "op", "baseline": "torch", "runs": [run], "results": rows}


def test_merging_replaces_whole_cases_and_forgets_runs_without_any():
    first = record(
        "1", [row("M=1", "llmkern", 1.0), row("M=1", "torch", 2.0), row("M=4", "torch", 3.0)]
    )
    second = record("2", [row("M=1", "llmkern", 0.9), row("M=8", "llmkern", 4.0)])
    merged = _report.merge(first, second)
    assert [(r["case"], r["contender"], r["median"], r["run"]) for r in merged["results"]] == [
        ("M=1", "llmkern", 0.9, 1),
        ("M=4", "torch", 3.0, 0),
        ("M=8", "llmkern", 4.0, 1),
    ]
    third = record("3", [row("M=4", "torch", 2.5)])
    last = _report.merge(merged, third)
    assert [run["commit"] for run in last["runs"]] == ["2", "3"]
    assert [(r["case"], r["run"]) for r in last["results"]] == [("M=1", 0), ("M=4", 1), ("M=8", 0)]
    assert json.loads(json.dumps(last)) == last


def test_summary_names_the_worst_cell_and_the_missing():
    rows = [
        row("M=1", "llmkern", 1.0, times_best_other=2.0, tokens=1),
        row("M=4", "llmkern", 1.0, times_best_other=0.5, tokens=4),
        row("M=4", "torch", 0.5, note="in bf16", tokens=4),
    ]
    rows.append({**row("M=4", "gone", 1.0, tokens=4), "median": None, "problem": "not installed"})
    text = _report.summary(record("1", rows))
    assert "llmkern: 1.00 x the best other (geometric mean of 2), worst cell 0.50 at M=4" in text
    assert "no number for gone: not installed" in text
    assert "torch: in bf16" in text
    assert _report.table(record("1", rows)).row_count == 4


def test_times_on_a_gpu_are_microseconds():
    assert _report.unit(record("1", [], gpu="H200")) == ("µs", 1e6)
    assert _report.unit(record("1", [])) == ("ms", 1e3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    ["bench_w4a16_gemm", "bench_lut4_gemm", "bench_sparse24_gemm", "bench_chain", "run_all"],
)
def test_scripts_start(script):
    command = [sys.executable, str(BENCH / f"{script}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "--device" in done.stdout


def methods():
    yield matmul.dense("torch float32", torch.float32, 1e-5)
    yield matmul.dense("torch bfloat16", torch.bfloat16)


def test_matmul_cases_check_results_and_share_the_packed_weight():
    first, second = matmul.cases(list(methods()), [(64, 48)], (1, 5), 0.5, 1 << 16)
    for case, M in ((first, 1), (second, 5)):
        for each in case.contenders:
            y = each.run(each.copies)
            assert y.shape == (M, 48)
            assert each.mismatch(y) is None
            assert each.mismatch(y.roll(1, 1)) is not None
            assert each.mismatch(torch.full_like(y, float("nan"))) is not None
            assert "shape" in each.mismatch(y[:, :-1])
    assert first.contenders[0].copies == -(-(1 << 16) // (64 * 48 * 4))


def test_peer_that_packs_wrongly_or_not_at_all_is_reported():
    def broken(w):
        raise RuntimeError("needs mslk")

    wrong = matmul.Method("wrong", lambda w: w.flip(0), torch.nn.functional.linear)
    wrong = replace(wrong, x_dtype=torch.float32)
    absent = matmul.attempt("absent", lambda: broken(None))
    broken_method = matmul.Method("broken", broken, torch.nn.functional.linear)
    (case,) = matmul.cases([wrong, absent, broken_method], [(64, 48)], (2,), 0.5, 1 << 12)
    problems = [each.unavailable for each in case.contenders]
    assert "off the original" in problems[0]
    assert problems[1:] == ["RuntimeError: needs mslk"] * 2


def test_command_is_the_one_to_type_in_the_repository() -> None:
    script = Path(_report.__file__).with_name("bench_obs.py")
    assert _report._command([str(script), "--rounds", "2"]) == "bench/bench_obs.py --rounds 2"
    assert _report._command(["/elsewhere/x.py"]) == "/elsewhere/x.py"
