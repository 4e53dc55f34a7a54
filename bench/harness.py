"""Side-by-side benchmarks: correctness first, interleaved rounds, cold weights, one table, one file.

A bench file lists cases; a case lists contenders that do the same job. `run` checks each contender's
result before timing it (a mismatch gets no number), then visits the contenders in turn, round after
round, so that a disturbance of the machine hits all of them alike. Each visit calls a contender for
`burst_s` seconds, moving through a ring of distinct copies of its data that is larger than the
caches. Reported: median and 20th/80th percentile over the rounds, the ratio to the baseline and to
the best contender that is not ours, and how close the time comes to the roofline floor, whose
bandwidth and arithmetic peak are measured in the same run.
"""

from __future__ import annotations

import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from llmkern._backends import compiled_module
from llmkern._memory import empty_huge
from llmkern.testing import relative_error

RING_BYTES = 512 << 20


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
    """

    name: str
    run: Callable[[int], Any]
    mismatch: Callable[[Any], str | None]
    ours: bool = False
    unavailable: str | None = None


@dataclass(frozen=True)
class Case:
    """A job, and those who do it.

    Attributes:
        label: shown in the table, such as "M=1 K=4096 N=14336".
        contenders: in the order of the table.
        bytes: least number of bytes that our way of doing the job must move from or to memory.
        flops: number of additions and multiplications.
        flops_dtype: the arithmetic peak of the floor is that of torch's matmul in this dtype.
    """

    label: str
    contenders: list[Contender]
    bytes: float
    flops: float
    flops_dtype: torch.dtype = torch.bfloat16


@dataclass
class Timing:
    """Result of one contender in one case; times in seconds per call, None where there is none."""

    case: str
    contender: str
    ours: bool
    problem: str | None = None
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    floor: float | None = None
    times_baseline: float | None = None
    times_best_other: float | None = None


@dataclass(frozen=True)
class Options:
    """How long to measure, and where to put the result.

    Attributes:
        rounds: visits per contender.
        burst_s: least seconds per visit; 0 for one call.
        json_path: file to write, or None.
    """

    rounds: int = 15
    burst_s: float = 0.02
    json_path: Path | None = None


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


def copies(nbytes: int, ring_bytes: int = RING_BYTES) -> int:
    """How many distinct copies of `nbytes` bytes of data make a ring larger than the caches."""
    return max(2, -(-ring_bytes // nbytes))


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


@cache
def read_bandwidth() -> float:
    """Bytes per second of reading a buffer of `RING_BYTES` on huge pages, all threads, best of 15."""
    on_gpu = torch.get_default_device().type == "cuda"
    empty = torch.empty if on_gpu else empty_huge
    buffer = empty((RING_BYTES // 8,), dtype=torch.int64).fill_(1)
    return RING_BYTES / min(_seconds(buffer.sum) for _ in range(15))


@cache
def matmul_peak(dtype: torch.dtype) -> float:
    """Flops per second of torch's own matmul of 2048 x 2048 matrices, best of 10."""
    a = torch.randn(2048, 2048, dtype=dtype)
    return 2 * 2048**3 / min(_seconds(lambda: a @ a) for _ in range(10))


def _seconds(work: Callable[[], Any]) -> float:
    _wait()
    start = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    """Until the GPU has done its work, where the contenders run on one."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()


def environment() -> dict[str, Any]:
    """Versions, commit, CPU and threads, for the record beside the numbers."""
    cpu, _ = compiled_module("_cpu")
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("bitsandbytes", "llmcompressor", "torchao", "triton"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": " ".join(sys.argv),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _git("describe", "--always", "--dirty"),
        "cpu": _cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "isa": cpu.isa() if cpu else None,
        "versions": versions,
    }


def _git(*args: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *args]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    return found[1] if found else platform.processor()


def measure(case: Case, peaks: Peaks, options: Options, baseline: str) -> list[Timing]:
    """Check, then time, every contender of a case."""
    timings = [Timing(case.label, c.name, c.ours, c.unavailable) for c in case.contenders]
    floor = peaks.floor(case)
    live = []
    for contender, timing in zip(case.contenders, timings, strict=True):
        timing.floor = floor
        if timing.problem is None:
            timing.problem = contender.mismatch(contender.run(0))
        if timing.problem is None:
            live.append((contender, timing, _calls(contender, options), []))
    position = 2
    for _ in range(options.rounds):
        for contender, _, calls, samples in live:
            _wait()
            start = time.perf_counter()
            for i in range(position, position + calls):
                contender.run(i)
            _wait()
            samples.append((time.perf_counter() - start) / calls)
        position += max((calls for _, _, calls, _ in live), default=0)
    for _, timing, _, samples in live:
        timing.median = statistics.median(samples)
        spread = statistics.quantiles(samples, n=5) if len(samples) > 1 else samples
        timing.p20, timing.p80 = spread[0], spread[-1]
    _compare(timings, baseline)
    return timings


def _calls(contender: Contender, options: Options) -> int:
    """How many calls make a visit of `burst_s` seconds; a job of seconds is not run to find out."""
    if not options.burst_s:
        return 1
    return max(1, round(options.burst_s / _seconds(lambda: contender.run(1))))


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
        console.width = 120
    with console.status(bench) as status:
        for case in cases:
            status.update(f"{bench}: {case.label}")
            timings += measure(case, peaks, options, baseline)
    env = environment()
    console.print(_table(bench, timings, baseline))
    console.print(_summary(timings, peaks, env), soft_wrap=True, highlight=False)
    if options.json_path:
        record = {"bench": bench, "baseline": baseline, **env, "peaks": asdict(peaks)}
        record["results"] = [asdict(t) for t in timings]
        options.json_path.write_text(json.dumps(record, indent=1) + "\n")
    return timings


def _table(bench: str, timings: list[Timing], baseline: str) -> Table:
    table = Table(title=bench)
    table.add_column("case")
    table.add_column("contender")
    for heading in ("median ms", "p20", "p80", "% of floor", f"× {baseline}", "× best other"):
        table.add_column(heading, justify="right")
    previous = None
    for t in timings:
        if previous not in (None, t.case):
            table.add_section()
        case = "" if t.case == previous else t.case
        name = f"[bold]{t.contender}[/bold]" if t.ours else t.contender
        previous = t.case
        if t.median is None:
            table.add_row(case, name, "–")
            continue
        share = f"{100 * t.floor / t.median:.0f}" if t.ours and t.floor else ""
        ms = [f"{1e3 * s:.3f}" for s in (t.median, t.p20, t.p80) if s is not None]
        table.add_row(case, name, *ms, share, _ratio(t.times_baseline), _ratio(t.times_best_other))
    return table


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _summary(timings: list[Timing], peaks: Peaks, env: dict[str, Any]) -> str:
    lines = [
        f"{env['cpu']}, {env['threads']} threads, {env['isa']}, torch {env['versions']['torch']}, "
        f"commit {env['commit']}",
        f"measured: read {peaks.read_bytes_per_s / 1e9:.1f} GB/s"
        + "".join(f", {d} matmul {f / 1e9:.0f} GFLOP/s" for d, f in peaks.flops_per_s.items()),
    ]
    problems = {(t.contender, t.problem) for t in timings if t.problem}
    lines += [f"no number for {name}: {problem}" for name, problem in sorted(problems)]
    ours = [t for t in timings if t.times_best_other is not None]
    if ours:
        worst = min(ours, key=lambda t: t.times_best_other or 0)
        lines.append(
            f"worst cell: {worst.case}, {worst.contender}: {_ratio(worst.times_best_other)} x the "
            "best other"
        )
    return "\n".join(lines)


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
