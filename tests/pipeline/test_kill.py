"""`llmkern compress`, killed with SIGKILL again and again: what is left at the end has the same bits."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

RECIPE = """\
- prune: {method: glu, ratio: 0.25}
- quantize: {method: gptq, group_size: 32}
- distill: {student: {layers: 0.5, width: 0.75}, steps: 8, checkpoint_every: 1, batch_size: 2}
"""
KILLS = 6


def compress(context: Any, arguments: list[str]) -> Any:
    """The command in a process of its own, forked from one that has only imported what it needs."""
    words = ["llmkern", "compress", *arguments]
    code = f"import sys; sys.argv = {words}; import llmkern.cli; llmkern.cli.main()"
    process = context.Process(target=exec, args=(code,))
    process.start()
    return process


def paths(out: Path) -> set[str]:
    """All that is in a directory at about this moment."""
    return {str(path.relative_to(out)) for path in walk(out)}


def walk(folder: Path) -> Iterator[Path]:
    try:
        for path in folder.iterdir():
            yield path
            if path.is_dir():
                yield from walk(path)
    except FileNotFoundError:  # renamed meanwhile
        return


def watch(process: Any, out: Path, count: int | None, seen: set[str]) -> bool:
    """Let the process run until so many paths have been seen; whether it still runs."""
    while process.is_alive() and (count is None or len(seen) < count):
        # Names of files that are not finished yet are drawn at random.
        seen |= {path.split("partial")[0] for path in paths(out)}
        time.sleep(0.001)
    return process.is_alive()


def bits(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*.safetensors")}


# What a report says of the run, not of its result: times, memory, tokens since the resumption, places.
OF_THE_RUN = ("seconds", "peak_memory_bytes", "tokens", "checkpoint")


def result(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: result(v) for k, v in value.items() if k not in OF_THE_RUN}
    return [result(item) for item in value] if isinstance(value, list) else value


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_killed_and_resumed_is_as_if_nothing_had_happened(
    seed, model_dir, tokens, held_out, tmp_path
):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llmkern.cli", "llmkern.pipeline", "transformers.models.llama"])
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    def arguments(out: Path) -> list[str]:
        options = {
            "recipe": tmp_path / "recipe.yaml",
            "calibration": tokens,
            "evaluation": held_out,
        }
        given = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        return [str(model_dir), "-o", str(out), *given, "--no-speed", "--resume"]

    whole, out = tmp_path / "whole", tmp_path / "killed"
    all_seen: set[str] = set()
    process = compress(context, arguments(whole))
    assert not watch(process, whole, None, all_seen)
    process.join()
    assert process.exitcode == 0

    random_numbers = random.Random(seed)
    seen: set[str] = set()
    inside, killed = 0, 0
    for kill in range(KILLS):
        # One point in each part of the run, and a moment later.
        part = len(all_seen) / KILLS
        process = compress(context, arguments(out))
        if watch(process, out, round((kill + random_numbers.random()) * part), seen):
            time.sleep(random_numbers.random() * 0.03)
            process.kill()
            killed += process.is_alive()
        process.join()
        assert process.exitcode in (0, -9)
        now = paths(out)
        inside += any("/block-" in path or path.endswith("newest/state.json") for path in now)
    process = compress(context, arguments(out))
    process.join()
    assert process.exitcode == 0
    assert killed >= KILLS // 2
    assert inside >= 2
    assert bits(out) == bits(whole)
    assert len(bits(out)) == 4
    assert paths(out) == paths(whole)
    reports = [json.loads((folder / "report.json").read_text()) for folder in (whole, out)]
    mine, theirs = (result(report["stages"]) for report in reports)
    assert mine == theirs
    assert mine[-1]["evaluation"]["kl"] > 0
