"""sparse24_w4a16_gemm against our dense 4-bit product and torch's in bfloat16, weights cold.

python bench/bench_sparse24_w4a16_gemm.py --m 1 --m 16 --json out.json
python bench/bench_sparse24_w4a16_gemm.py --shape 4096x14336 --json out.json --merge
pytest bench/bench_sparse24_w4a16_gemm.py          (one small case, through pytest-benchmark)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import harness
import matmul
import ours
import torch
import typer
from bench_w4a16_gemm import GPU_ROWS, ROWS, SHAPES
from harness import Contender
from matmul import Method

# Kept codes, 4 bits of metadata per 4 columns, and a bfloat16 scale per group of 128.
WEIGHT_BYTES = 1 / 4 + 1 / 8 + 2 / 128


def methods(skip: Sequence[str] = ()) -> list[Method]:
    """Ours, 2:4 and dense codes, and torch's dense product, less those of the names in `skip`."""
    bf16, f32 = torch.bfloat16, torch.float32
    if harness.on_gpu():
        int4 = [
            ours.sparse24_method(bf16, "cuda", codes=True, backend="cuda"),
            ours.sparse24_method(bf16, "canonical", codes=True, backend="triton"),
            *ours.w4a16_methods(),
        ]
    else:
        int4 = [ours.sparse24_method(dtype, "cpu", codes=True) for dtype in (bf16, f32)]
        int4 += [ours.w4a16_method(dtype, "cpu") for dtype in (bf16, f32)]
    every = [*int4, matmul.dense("torch bfloat16", bf16)]
    return [method for method in every if method.name not in skip]


def cases(shapes: Sequence[tuple[int, int]], rows: Sequence[int], ring: int, skip: Any = ()) -> Any:
    return matmul.cases(methods(skip), shapes, rows, WEIGHT_BYTES, ring, matmul.sparse24_weight)


def pytest_generate_tests(metafunc: Any) -> None:
    harness.parametrize(metafunc, lambda: next(cases([(512, 256)], (4,), 1 << 20)))


def test_contender(benchmark: Any, contender: Contender) -> None:
    harness.check_and_benchmark(benchmark, contender)


def main(
    shape: Annotated[list[str] | None, typer.Option(help="KxN, repeatable")] = None,
    m: Annotated[list[int] | None, typer.Option(help="rows of x, repeatable")] = None,
    rounds: harness.Rounds = 15,
    seconds: harness.Seconds = 15,
    skip: harness.Skip = None,
    warm: Annotated[bool, typer.Option(help="one copy of each weight, in the caches")] = False,
    json: harness.Json = None,
    merge: harness.Merge = False,
    device: harness.Device = "cpu",
) -> None:
    """Time sparse24_w4a16_gemm beside dense and 4-bit products."""
    harness.use_device(device)
    shapes = [matmul.parse_shape(s) for s in shape or SHAPES]
    rows = m or (GPU_ROWS if harness.on_gpu() else ROWS)
    ring = 0 if warm else harness.ring_bytes()
    options = harness.Options(rounds, seconds, json, merge)
    harness.run(
        "sparse24_w4a16_gemm", cases(shapes, rows, ring, skip or ()), "torch bfloat16", options
    )


if __name__ == "__main__":
    with torch.inference_mode():
        typer.run(main)
