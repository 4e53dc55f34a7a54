"""Side-by-side benchmarks: correctness first, interleaved rounds, cold weights, one table, one file.

A bench file lists cases; a case lists contenders that do the same job. `run` checks each contender's
result before timing it (a mismatch gets no number), then visits the contenders in turn, round after
round, so that a disturbance of the machine hits all of them alike. Each call takes the next of a ring
of distinct copies of the contender's data that is larger than the caches. On a CPU a visit is a burst
of calls; on a GPU it is the replay of a CUDA graph (`_gpu`). Reported: median, least, and 20th/80th
percentile over the visits, the ratio to the baseline and to the best contender that is not ours, and
how close the time comes to the roofline floor, whose bandwidth and arithmetic peak are measured in
the same run (`_report`).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import _gpu
import _report
import torch
import typer
from rich.console import Console
from torch import Tensor

from llmkern._json import to_json
from llmkern._memory import empty_huge
from llmkern.testing import relative_error

# More than the last-level cache of the servers at hand, so that the ring's weights come from memory.
RING_BYTES = 512 << 20
FEWEST_VISITS = 3

# Command-line options that every bench file has.
Json = Annotated[Path | None, typer.Option(help="write the results to this file")]
Merge = Annotated[bool, typer.Option(help="keep the other cases that the file has")]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
Rounds = Annotated[int, typer.Option(help="visits per contender")]
Seconds = Annotated[float, typer.Option(help="time budget of a case on a CPU, setting up apart")]
Skip = Annotated[list[str] | None, typer.Option(help="contender to leave out, repeatable")]


@dataclass(frozen=True)
class Contender:
    """One way of doing a case's job.

    Attributes:
        name: shown in the table.
        run: called with 0, 1, 2, ...; does the job once on copy number i of its ring of data and
            returns the result.
        mismatch: given the result of run(0), says what is wrong with it, or None; see `close_to`.
        ours: whether it is this project's; ratios are formed against the others.
        unavailable: why it cannot run here, or None.
        copies: length of its ring.
        note: how its job differs from the others', shown below the table.
        finding: what `mismatch` found out that is worth a note, called after it.
    """

    name: str
    run: Callable[[int], Any]
    mismatch: Callable[[Any], str | None]
    ours: bool = False
    unavailable: str | None = None
    copies: int = 1
    note: str | None = None
    finding: Callable[[], str] | None = None


@dataclass(frozen=True)
class Case:
    """A job, and those who do it.

    Attributes:
        label: shown in the table, such as "M=1 K=4096 N=14336".
        contenders: in the order of the table.
        bytes: least number of bytes that our way of doing the job must move from or to memory.
        flops: number of additions and multiplications.
        flops_dtype: the arithmetic peak of the floor is that of torch's matmul in this dtype.
        kernels: how many kernels one call launches, at least.
        tokens: rows that one call serves, where the time per row is of interest.
    """

    label: str
    contenders: list[Contender]
    bytes: float
    flops: float
    flops_dtype: torch.dtype = torch.bfloat16
    kernels: int = 1
    tokens: int | None = None


@dataclass
class Timing:
    """Result of one contender in one case; times in seconds per call, None where there is none."""

    case: str
    contender: str
    ours: bool
    problem: str | None = None
    note: str | None = None
    median: float | None = None
    least: float | None = None
    p20: float | None = None
    p80: float | None = None
    host: float | None = None  # GPU: what an eager call costs the CPU
    floor: float | None = None
    tokens: int | None = None
    times_baseline: float | None = None
    times_best_other: float | None = None
    run: int = 0  # which of the record's runs measured it


@dataclass(frozen=True)
class Options:
    """How long to measure, and where to put the result.

    Attributes:
        rounds: visits per contender.
        seconds: budget of a case, shared by its contenders; a call that is longer than its share of a
            round sits rounds out, down to `FEWEST_VISITS`. 0: one call per visit. GPU: ignored.
        json_path: file to write, or None.
        merge: keep the results that the file has for other cases.
        skip: names of contenders to leave out.
    """

    rounds: int = 15
    seconds: float = 15
    json_path: Path | None = None
    merge: bool = False
    skip: tuple[str, ...] = ()


@dataclass
class Peaks:
    """What this machine can do, measured now: bytes/s of reading and flops/s of torch's matmul."""

    read_bytes_per_s: float
    flops_per_s: dict[str, float] = field(default_factory=dict)

    def floor(self, case: Case) -> float:
        """Seconds below which the case cannot be done."""
        dtype = str(case.flops_dtype).removeprefix("torch.")
        if dtype not in self.flops_per_s:
            self.flops_per_s[dtype] = matmul_peak(case.flops_dtype)
        return max(case.bytes / self.read_bytes_per_s, case.flops / self.flops_per_s[dtype])


def use_device(device: str) -> None:
    """Make tensors on `device` from here on. The CPU is torch's default and costs calls nothing."""
    if torch.device(device).type != "cpu":
        torch.set_default_device(device)


def on_gpu() -> bool:
    """Whether the contenders run on a GPU."""
    return torch.get_default_device().type == "cuda"


def ring_bytes() -> int:
    """Size of a ring that is larger than the caches of the device in use."""
    return _gpu.ring_bytes(_gpu.l2_bytes()) if on_gpu() else RING_BYTES


def copies(nbytes: int, ring: int) -> int:
    """How many distinct copies of `nbytes` bytes of data make a ring of `ring` bytes."""
    return max(2, -(-ring // nbytes))


def close_to(spec: Tensor, tolerance: float) -> Callable[[Any], str | None]:
    """A `mismatch` function: relative error (Frobenius norm, float64) of the result from `spec`."""

    def mismatch(out: Any) -> str | None:
        if out.shape != spec.shape:
            return f"shape {tuple(out.shape)}, expected {tuple(spec.shape)}"
        error = relative_error(out, spec)
        return None if error <= tolerance else f"relative error {error:.1e} > {tolerance:.1e}"

    return mismatch


def missing(name: str, why: str) -> Contender:
    """A contender that cannot run here; it is listed with the reason."""
    return Contender(name, lambda i: None, lambda out: None, unavailable=why)


def reason(error: Exception) -> str:
    """An exception as one short line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


@cache
def read_bandwidth() -> float:
    """Bytes per second of reading memory, all threads, best of 15; on a CPU from huge pages."""
    if on_gpu():
        return _gpu.read_bandwidth()
    buffer = empty_huge((RING_BYTES // 8,), dtype=torch.int64).fill_(1)
    return RING_BYTES / min(_seconds(buffer.sum) for _ in range(15))


@cache
def matmul_peak(dtype: torch.dtype) -> float:
    """Flops per second of torch's own matmul of square matrices, best of 10."""
    size = 8192 if on_gpu() else 2048
    a = torch.randn(size, size, dtype=dtype)
    return 2 * size**3 / min(_seconds(lambda: a @ a) for _ in range(10))


def _seconds(work: Callable[[], Any]) -> float:
    if on_gpu():
        return _gpu.seconds(work)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(case: Case, peaks: Peaks, options: Options, baseline: str) -> list[Timing]:
    """Check, then time, every contender of a case."""
    floor = peaks.floor(case)
    timings, live = [], []
    for contender in case.contenders:
        if contender.name in options.skip:
            continue
        timing = Timing(case.label, contender.name, contender.ours, note=contender.note)
        timing.floor, timing.tokens = floor, case.tokens
        timing.problem = contender.unavailable or _check(contender)
        if contender.finding is not None and timing.problem is None:
            timing.note = "; ".join(filter(None, (timing.note, contender.finding())))
        timings.append(timing)
        if timing.problem is None:
            live.append((contender, timing))
    contenders = [contender for contender, _ in live]
    if on_gpu():
        for (_, timing), result in zip(
            live, _gpu.visit(contenders, options.rounds, case.kernels), strict=True
        ):
            timing.host, timing.problem = result.host, result.problem
            _fill(timing, result.samples)
    else:
        for (_, timing), samples in zip(live, _visit(contenders, options), strict=True):
            _fill(timing, samples)
    _compare(timings, baseline)
    return timings


def _check(contender: Contender) -> str | None:
    """What is wrong with the contender's result. A peer that raises has a problem; ours is a bug."""
    try:
        return contender.mismatch(contender.run(0))
    except Exception as error:
        if contender.ours:
            raise
        return reason(error)


def _visit(contenders: list[Contender], options: Options) -> list[list[float]]:
    """Seconds per call of each contender on each of its visits."""
    samples: list[list[float]] = [[] for _ in contenders]
    share = options.seconds / (options.rounds * max(1, len(contenders)))
    plans = []
    for contender in contenders:
        # A job of seconds is not run to find out how long it takes.
        once = _seconds(lambda run=contender.run: run(1)) if options.seconds else 0.0
        plans.append(visit_plan(once, share, options.rounds))
    position = [2] * len(contenders)
    for turn in range(options.rounds):
        for index, (contender, (calls, every)) in enumerate(zip(contenders, plans, strict=True)):
            if turn % every:
                continue
            start = time.perf_counter()
            for i in range(position[index], position[index] + calls):
                contender.run(i)
            samples[index].append((time.perf_counter() - start) / calls)
            position[index] += calls
    return samples


def visit_plan(once: float, share: float, rounds: int) -> tuple[int, int]:
    """Calls per visit, and every how many rounds to visit, for a call of `once` seconds."""
    if not share or not once:
        return 1, 1
    most = max(1, rounds // FEWEST_VISITS)
    return max(1, round(share / once)), min(most, max(1, round(once / share)))


def _fill(timing: Timing, samples: list[float]) -> None:
    if not samples:
        return
    timing.median, timing.least = statistics.median(samples), min(samples)
    spread = statistics.quantiles(samples, n=5) if len(samples) > 1 else samples
    timing.p20, timing.p80 = spread[0], spread[-1]


def _compare(timings: list[Timing], baseline: str) -> None:
    """Fill in the ratios: above 1 is faster than the baseline, than the best that is not ours."""
    times = {t.contender: t.median for t in timings if t.median}
    others = [t.median for t in timings if t.median and not t.ours]
    for timing in timings:
        if timing.median is None:
            continue
        if times.get(baseline):
            timing.times_baseline = times[baseline] / timing.median
        if timing.ours and others:
            timing.times_best_other = min(others) / timing.median


def run(bench: str, cases: Iterable[Case], baseline: str, options: Options) -> list[Timing]:
    """Measure all cases, print one table and write the JSON file.

    Args:
        bench: title, such as the op's name.
        cases: may be a generator, so that only one case's data is in memory.
        baseline: name of the contender that ratios are formed against.
        options: how long to measure, and where to write.

    Returns:
        Every timing, in the order of the table.
    """
    peaks = Peaks(read_bandwidth())
    timings: list[Timing] = []
    console = Console()
    if not console.is_terminal:
        console.width = 140
    with console.status(bench) as status, _gpu.clock_log(on_gpu()) as clocks:
        for case in cases:
            status.update(f"{bench}: {case.label}")
            timings += measure(case, peaks, options, baseline)
            clocks.mark(case.label)
            del case  # its data goes before the next case's is made
    environment = _report.environment(on_gpu())
    this_run = {**environment, "peaks": asdict(peaks), "clocks": clocks.by_case}
    record = {"bench": bench, "baseline": baseline, "runs": [this_run]}
    record["results"] = [asdict(t) for t in timings]
    console.print(_report.table(record))
    console.print(_report.summary(record), soft_wrap=True, highlight=False)
    if options.json_path:
        old = options.json_path.read_text() if options.json_path.is_file() else ""
        if options.merge and old:
            record = _report.merge(json.loads(old), record)
        options.json_path.write_text(to_json(record, indent=1) + "\n")
    return timings


def parametrize(metafunc: Any, case: Callable[[], Case]) -> None:
    """For a bench file's pytest_generate_tests: one test per contender of a small case."""
    if "contender" in metafunc.fixturenames:
        contenders = case().contenders
        metafunc.parametrize("contender", contenders, ids=[c.name for c in contenders])


def check_and_benchmark(benchmark: Any, contender: Contender) -> None:
    """Body of a bench file's test: the result must be right, then pytest-benchmark times the call."""
    import pytest

    if contender.unavailable:
        pytest.skip(contender.unavailable)
    problem = contender.mismatch(contender.run(0))
    assert problem is None, problem
    benchmark(contender.run, 1)
