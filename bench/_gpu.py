"""Timing on a CUDA device: graphs over a ring of cold weights, interleaved; clocks logged.

What needs no device (sizes, the plan of calls, the parsing of nvidia-smi's lines) is in functions of
its own, which the tests call; the rest has not run on a GPU yet.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from harness import Contender

FEWEST_CALLS = 20  # in one graph, so that the launch of the graph does not count
WARM_UP = 3
HOST_CALLS, HOST_VISITS = 20, 5
CLOCK_FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")

# NVIDIA's data sheets: bytes/s of memory, dense bf16 flops/s. For the record, beside what is measured.
SPECIFIED = {
    "H200": (4.8e12, 989e12),
    "H100 PCIe": (2.0e12, 756e12),
    "H100": (3.35e12, 989e12),
    "A100": (2.04e12, 312e12),
}


@dataclass
class Visits:
    """One contender's seconds per call, the CPU's share of an eager call, or what went wrong."""

    samples: list[float] = field(default_factory=list)
    host: float | None = None
    problem: str | None = None


def ring_bytes(l2: int) -> int:
    """Size of a ring that leaves nothing of a buffer in an L2 of `l2` bytes until its next turn."""
    return max(4 * l2, 200 << 20)


def graph_calls(copies: int, kernels: int = 1) -> int:
    """Calls in one graph: whole turns of a ring of `copies`, at least `FEWEST_CALLS` kernels."""
    return copies * -(-FEWEST_CALLS // (copies * kernels))


def specified(name: str) -> tuple[float, float] | None:
    """The data sheet's bandwidth and bf16 peak of a device by its name, or None."""
    return next((peaks for key, peaks in SPECIFIED.items() if key in name), None)


def l2_bytes() -> int:
    """The current device's L2 cache."""
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def seconds(work: Callable[[], Any]) -> float:
    """Seconds the device needs for `work`, queued behind itself so that launching it is hidden."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    work()
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def read_bandwidth() -> float:
    """Bytes per second: the better of a sum over 2 GiB and a copy of 1 GiB (read and written)."""
    size = 2 << 30
    buffer = torch.ones(size // 4, dtype=torch.float32, device="cuda")
    low, high = buffer.chunk(2)
    rates = [size / seconds(work) for work in (buffer.sum, lambda: high.copy_(low)) * 15]
    return max(rates)


def visit(contenders: list[Contender], rounds: int, kernels: int) -> list[Visits]:
    """Time every contender `rounds` times, in turn, on a graph of cold calls."""
    results = [Visits() for _ in contenders]
    replays: list[Callable[[], Any]] = []
    for contender, result in zip(contenders, results, strict=True):
        try:
            result.host = _host_latency(contender)
            replays.append(_capture(contender, graph_calls(contender.copies, kernels)))
        except Exception as error:
            if contender.ours:
                raise
            line = str(error).splitlines()[0][:120] if str(error) else ""
            result.problem = f"no CUDA graph of it: {type(error).__name__}: {line}"
            replays.append(lambda: None)
            torch.cuda.synchronize()
    for _ in range(rounds):
        for contender, result, replay in zip(contenders, results, replays, strict=True):
            if result.problem is None:
                calls = graph_calls(contender.copies, kernels)
                result.samples.append(seconds(replay) / calls)
    return results


def _capture(contender: Contender, calls: int) -> Callable[[], Any]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(max(WARM_UP, contender.copies)):  # lazy repacking and autotuning happen here
            contender.run(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            contender.run(i)
    return graph.replay


def _host_latency(contender: Contender) -> float:
    """Median seconds that the CPU spends in one eager call, the device idle before each visit."""
    samples = []
    default = torch.get_default_device()
    torch.set_default_device(None)  # a default device that is not the CPU slows every call down
    try:
        for _ in range(HOST_VISITS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for i in range(HOST_CALLS):
                contender.run(i)
            samples.append((time.perf_counter() - start) / HOST_CALLS)
        torch.cuda.synchronize()
    finally:  # a peer may raise: the others still run on the device
        torch.set_default_device(default)
    return statistics.median(samples)


def smi_index(device: int) -> str:
    """What nvidia-smi calls a device: it numbers all of them, whatever CUDA_VISIBLE_DEVICES says."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return "GPU-" + uuid.removeprefix("GPU-")


def parse_clocks(line: str) -> dict[str, float] | None:
    """One line of nvidia-smi's CSV as numbers by field; None if any is missing."""
    try:
        values = [float(part) for part in line.split(",")]
    except ValueError:
        return None
    return (
        dict(zip(CLOCK_FIELDS, values, strict=True)) if len(values) == len(CLOCK_FIELDS) else None
    )


class ClockLog:
    """Clocks, power and temperature: medians over the time since the last mark, by case."""

    def __init__(self) -> None:
        self.by_case: dict[str, dict[str, float]] = {}
        self._samples: list[dict[str, float]] = []

    def add(self, line: str) -> None:
        """Take one line of nvidia-smi's."""
        sample = parse_clocks(line)
        if sample:
            self._samples.append(sample)

    def mark(self, case: str) -> None:
        """The case has ended: what came in since the last mark is its."""
        samples, self._samples = self._samples, []
        if samples:
            self.by_case[case] = {
                key: statistics.median(sample[key] for sample in samples) for key in CLOCK_FIELDS
            }


@contextmanager
def clock_log(wanted: bool) -> Iterator[ClockLog]:
    """A log that nvidia-smi feeds five times a second, where it is wanted and there is one."""
    log = ClockLog()
    if not wanted or not shutil.which("nvidia-smi"):
        yield log
        return
    command = ["nvidia-smi", f"--query-gpu={','.join(CLOCK_FIELDS)}"]
    command += [
        "--format=csv,noheader,nounits",
        "-lms",
        "200",
        "-i",
        smi_index(torch.cuda.current_device()),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            log.add(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield log
    finally:
        process.terminate()
        reader.join()
        process.wait()
