"""hessian_update against torch's matrix product and symmetric updates.

python bench/bench_hessian.py --shape 4096x4096 --json out.json
pytest bench/bench_hessian.py             (one small case, through pytest-benchmark)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import harness
import torch
import typer
from harness import Case, Contender
from torch import Tensor

from llmkern.ops import hessian_update

SHAPES = ("2048x1024", "2048x4096")
TOLERANCE = 2e-6


def make_case(T: int, K: int) -> Case:
    """H += 2/T xᵀx for x [T, K], by every contender; only the lower triangle is compared."""
    torch.manual_seed(0)
    x = torch.randn(T, K)
    brain = x.bfloat16()

    def contender(name: str, x: Tensor, update: Any, ours: bool) -> Contender:
        H = torch.zeros(K, K)
        wide = x.double()
        mismatch = harness.close_to((wide.t() @ wide * (2 / T)).tril(), TOLERANCE)

        def run(i: int) -> Tensor:
            if i == 0:
                H.zero_()
            update(H, x)
            return H.tril() if i == 0 else H

        return Contender(name, run, mismatch, ours)

    def ours(H: Tensor, x: Tensor) -> None:
        hessian_update(H, x, 2 / T)

    def matmul(H: Tensor, x: Tensor) -> None:
        x = x.float()
        H.addmm_(x.t(), x, alpha=2 / T)

    return Case(
        f"T={T} K={K}",
        [
            contender("llmkern float32", x, ours, True),
            contender("llmkern bfloat16", brain, ours, True),
            contender("torch float32", x, matmul, False),
            contender("torch bfloat16 as float32", brain, matmul, False),
        ],
        bytes=brain.nbytes + 4 * K * K,
        flops=T * K * (K + 1),
        flops_dtype=torch.float32,
    )


def pytest_generate_tests(metafunc: Any) -> None:
    harness.parametrize(metafunc, lambda: make_case(100, 256))


def test_contender(benchmark: Any, contender: Contender) -> None:
    harness.check_and_benchmark(benchmark, contender)


def main(
    shape: Annotated[list[str] | None, typer.Option(help="TxK, repeatable")] = None,
    rounds: harness.Rounds = 15,
    seconds: harness.Seconds = 10,
    json: harness.Json = None,
    merge: harness.Merge = False,
    device: harness.Device = "cpu",
) -> None:
    """Time hessian_update beside torch."""

    def cases() -> Iterator[Case]:
        for text in shape or SHAPES:
            yield make_case(*(int(part) for part in text.split("x")))

    harness.use_device(device)
    options = harness.Options(rounds, seconds, json, merge)
    harness.run("hessian_update", cases(), "torch float32", options)


if __name__ == "__main__":
    typer.run(main)
