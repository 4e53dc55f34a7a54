"""Results as a table, as a few lines below it, and as a record to keep beside those of other runs."""

from __future__ import annotations

import math
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import _gpu
import torch
from rich.table import Table

from llmkern._backends import compiled_module

PEERS = (
    "bitsandbytes",
    "gemlite",
    "gptqmodel",
    "llama-cpp-python",
    "llmcompressor",
    "torchao",
    "triton",
)


def environment(on_gpu: bool) -> dict[str, Any]:
    """Versions, commit, machine and threads, for the record beside the numbers."""
    from peers import ggml  # whose methods need the harness, which needs this module

    cpu, _ = compiled_module("_cpu")
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PEERS:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if not on_gpu and (ggml_version := ggml.version()):
        versions["ggml"] = ggml_version
    found = {
        "command": _command(sys.argv),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "cpu": _cpu_name(),
        "gpu": None,
        "threads": torch.get_num_threads(),
        "isa": cpu.isa() if cpu else None,
        "versions": versions,
    }
    if on_gpu:
        found["gpu"] = torch.cuda.get_device_name()
        found["specified_peaks"] = _gpu.specified(torch.cuda.get_device_name())
        versions["cuda"] = torch.version.cuda or ""
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        versions["driver"] = (driver or "").partition("\n")[0]
    return found


def _command(argv: list[str]) -> str:
    """The command line, with the script as it is called from the root of the repository."""
    script, root = Path(argv[0]).resolve(), Path(__file__).resolve().parent.parent
    path = script.relative_to(root) if script.is_relative_to(root) else script
    return " ".join([str(path), *argv[1:]])


def _commit() -> str | None:
    """Of the code that runs; results that an earlier bench has written do not make it another."""
    commit = _git("rev-parse", "--short", "HEAD")
    if commit is not None and _git("status", "--porcelain", "-uno", ":/", ":!/bench/results"):
        commit += "-dirty"
    return commit


def _git(*args: str) -> str | None:
    return _output("git", "-C", str(Path(__file__).parent), *args)


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    return found[1] if found else platform.processor()


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Both records as one: a case that `new` has measured replaces that of `old`, whole.

    Contenders of one case always come from one run, so that they have been side by side. Cases keep
    the order in which they were first recorded.
    """
    runs = [*old["runs"], *new["runs"]]
    by_case: dict[str, list[dict[str, Any]]] = {}
    for row in old["results"]:
        by_case.setdefault(row["case"], []).append(row)
    fresh: dict[str, list[dict[str, Any]]] = {}
    for row in new["results"]:
        shifted = {**row, "run": row["run"] + len(old["runs"])}
        fresh.setdefault(row["case"], []).append(shifted)
    results = [row for rows in (by_case | fresh).values() for row in rows]
    kept = sorted({row["run"] for row in results})
    number = {run: index for index, run in enumerate(kept)}
    return {
        "bench": new["bench"],
        "baseline": new["baseline"],
        "runs": [runs[run] for run in kept],
        "results": [{**row, "run": number[row["run"]]} for row in results],
    }


def unit(record: dict[str, Any]) -> tuple[str, float]:
    """Unit of the table's times, and how many of it make a second."""
    return ("µs", 1e6) if record["runs"][0]["gpu"] else ("ms", 1e3)


def table(record: dict[str, Any]) -> Table:
    """The record's results, case by case."""
    rows, (name, factor) = record["results"], unit(record)
    shown = Table(title=record["bench"])
    shown.add_column("case")
    shown.add_column("contender")
    for heading in (f"median {name}", "p20", "p80", "least", "% of floor"):
        shown.add_column(heading, justify="right")
    for heading in (f"× {record['baseline']}", "× best other", *_extra_headings(record)):
        shown.add_column(heading, justify="right")
    previous = None
    for row in rows:
        if previous not in (None, row["case"]):
            shown.add_section()
        case = "" if row["case"] == previous else row["case"]
        contender = f"[bold]{row['contender']}[/bold]" if row["ours"] else row["contender"]
        previous = row["case"]
        if row["median"] is None:
            shown.add_row(case, contender, "–")
            continue
        times = [f"{factor * row[key]:.3f}" for key in ("median", "p20", "p80", "least")]
        ratios = [ratio(row["times_baseline"]), ratio(row["times_best_other"])]
        shown.add_row(case, contender, *times, share(row), *ratios, *_extra(record, row))
    return shown


def _extra_headings(record: dict[str, Any]) -> list[str]:
    """Columns that only some records have."""
    rows = record["results"]
    headings = [f"{unit(record)[0]} per token"] if any(r["tokens"] for r in rows) else []
    return headings + (["eager call, host µs"] if any(r["host"] for r in rows) else [])


def _extra(record: dict[str, Any], row: dict[str, Any]) -> list[str]:
    rows = record["results"]
    cells = []
    if any(r["tokens"] for r in rows):
        cells.append(f"{unit(record)[1] * row['median'] / row['tokens']:.3f}")
    if any(r["host"] for r in rows):
        cells.append(f"{1e6 * row['host']:.1f}" if row["host"] else "")
    return cells


def share(row: dict[str, Any]) -> str:
    """How close one of ours comes to the floor, in per cent."""
    return f"{100 * row['floor'] / row['median']:.0f}" if row["ours"] and row["floor"] else ""


def ratio(value: float | None) -> str:
    """A ratio for a table's cell."""
    return "" if value is None else f"{value:.2f}"


def summary(record: dict[str, Any]) -> str:
    """The machine, who is missing and why, how others' jobs differ, geometric means, worst cells."""
    run, rows = record["runs"][-1], record["results"]
    peaks = run["peaks"]
    lines = [
        f"{run['gpu'] or run['cpu']}, {run['threads']} threads, {run['isa']}, "
        f"torch {run['versions']['torch']}, commit {run['commit']}",
        f"measured: read {peaks['read_bytes_per_s'] / 1e9:.1f} GB/s"
        + "".join(f", {d} matmul {f / 1e9:.0f} GFLOP/s" for d, f in peaks["flops_per_s"].items()),
    ]
    lines += clock_range(run["clocks"])
    problems = {(row["contender"], row["problem"]) for row in rows if row["problem"]}
    lines += [f"no number for {name}: {problem}" for name, problem in sorted(problems)]
    notes = {(row["contender"], row["note"]) for row in rows if row["note"]}
    lines += [f"{name}: {note}" for name, note in sorted(notes)]
    for name in dict.fromkeys(row["contender"] for row in rows if row["times_best_other"]):
        cells = [r for r in rows if r["contender"] == name and r["times_best_other"]]
        worst = min(cells, key=lambda r: r["times_best_other"])
        mean = math.exp(sum(math.log(r["times_best_other"]) for r in cells) / len(cells))
        lines.append(
            f"{name}: {mean:.2f} x the best other (geometric mean of {len(cells)}), "
            f"worst cell {worst['times_best_other']:.2f} at {worst['case']}"
        )
    return "\n".join(lines)


def clock_range(clocks: dict[str, dict[str, float]]) -> list[str]:
    """One line: from which to which value each of nvidia-smi's fields went over the cases."""
    if not clocks:
        return []
    spans = []
    for key in _gpu.CLOCK_FIELDS:
        values = [sample[key] for sample in clocks.values()]
        spans.append(f"{key} {min(values):.0f}–{max(values):.0f}")
    return ["nvidia-smi: " + ", ".join(spans)]
