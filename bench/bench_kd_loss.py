"""kd_loss, forward and backward, against the plain loss on logits: seconds and peak memory on the CPU.

python bench/bench_kd_loss.py --tokens 4096 --vocabulary 32000 --width 256 --json out.json

Each contender runs in a process of its own, whose peak resident memory is read before (inputs there,
libraries warm) and after. The plain loss is what a training script writes: logits of both models,
cross_entropy, kl_div of temperature-softened distributions, backward.
"""

from __future__ import annotations

import json as jsonlib
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from _report import environment
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from llmkern.ops import kd_loss

TEMPERATURE, ALPHA = 2.0, 0.5
app = typer.Typer()


def inputs(T: int, V: int, D: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "hidden": randn(T, D).requires_grad_(),
        "head": (randn(V, D) / D**0.5).requires_grad_(),
        "labels": torch.randint(0, V, (T,), generator=generator),
        "teacher_hidden": randn(T, D),
        "teacher_head": randn(V, D) / D**0.5,
    }


def plain(t: dict[str, Tensor]) -> Tensor:
    student = t["hidden"] @ t["head"].t()
    with torch.no_grad():
        teacher = t["teacher_hidden"] @ t["teacher_head"].t()
    p = F.log_softmax(student / TEMPERATURE, -1)
    q = F.softmax(teacher / TEMPERATURE, -1)
    kd = F.kl_div(p, q, reduction="batchmean") * TEMPERATURE**2
    return (1 - ALPHA) * F.cross_entropy(student, t["labels"]) + ALPHA * kd


def ours(t: dict[str, Tensor]) -> Tensor:
    return kd_loss(**t, temperature=TEMPERATURE, alpha=ALPHA).loss


CONTENDERS = {"llmkern kd_loss": ours, "plain loss": plain}


@app.command(hidden=True)
def child(name: str, tokens: int, vocabulary: int, width: int, runs: int) -> None:
    """Print the figures of one contender as JSON."""
    loss = CONTENDERS[name]

    def step(t: dict[str, Tensor]) -> Tensor:
        t["hidden"].grad = t["head"].grad = None
        value = loss(t)
        value.backward()
        return value.detach()

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    step(inputs(32, 64, width))
    t = inputs(tokens, vocabulary, width)
    before, seconds = peak(), []
    for _ in range(runs):
        start = time.perf_counter()
        value = step(t)
        seconds.append(time.perf_counter() - start)
    grads = [t[k].grad for k in ("hidden", "head")]
    norms = [float(g.double().norm()) for g in grads if g is not None]
    figures = {"peak_bytes": peak() - before, "seconds": median(seconds)}
    print(jsonlib.dumps({"name": name, **figures, "loss": float(value), "gradient norms": norms}))


def measure(name: str, tokens: int, vocabulary: int, width: int, runs: int) -> dict[str, object]:
    """The figures of one contender, from a process of its own."""
    shape = map(str, (tokens, vocabulary, width, runs))
    command = [sys.executable, __file__, "child", name, *shape]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode:
        raise RuntimeError(f"{name}: {out.stderr.strip().splitlines()[-1]}")
    return dict(jsonlib.loads(out.stdout.splitlines()[-1]))


@app.command()
def compare(
    tokens: Annotated[int, typer.Option(help="Rows of hidden states.")] = 4096,
    vocabulary: Annotated[int, typer.Option(help="Rows of the head.")] = 32000,
    width: Annotated[int, typer.Option(help="Columns of the head.")] = 256,
    runs: Annotated[int, typer.Option(help="Forward and backward passes; the median counts.")] = 3,
    json: Annotated[Path | None, typer.Option(help="Write the figures here too.")] = None,
) -> None:
    """Measure kd_loss beside the plain loss."""
    rows = [measure(name, tokens, vocabulary, width, runs) for name in CONTENDERS]
    mine, other = rows
    for a, b in zip(mine["gradient norms"], other["gradient norms"], strict=True):  # type: ignore[call-overload]
        if abs(a - b) > 1e-4 * abs(b):
            raise RuntimeError(f"gradient norms differ: {a} and {b}: not timed")
    table = Table("", "seconds", "peak MB", "loss", title=f"T={tokens} V={vocabulary} D={width}")
    for row in rows:
        size = float(str(row["peak_bytes"])) / 1e6
        table.add_row(
            str(row["name"]), f"{row['seconds']:.2f}", f"{size:.0f}", f"{row['loss']:.4f}"
        )
    Console().print(table)
    ratios = {k: float(str(mine[k])) / float(str(other[k])) for k in ("peak_bytes", "seconds")}
    print(
        f"llmkern / plain: {ratios['peak_bytes']:.2f} of the memory, {ratios['seconds']:.2f} of the time"
    )
    if json:
        shape = {"tokens": tokens, "vocabulary": vocabulary, "width": width}
        json.write_text(
            jsonlib.dumps(
                {
                    "environment": environment(on_gpu=False),
                    "shape": shape,
                    "rows": rows,
                    "ratios": ratios,
                },
                indent=2,
            )
            + "\n"
        )


if __name__ == "__main__":
    app() if sys.argv[1:2] == ["child"] else typer.run(compare)
