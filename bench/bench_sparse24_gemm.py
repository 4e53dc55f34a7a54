"""The products with 2:4 sparse weights, in 16 bits and in 4, against dense ones and torch's 2:4.

python bench/bench_sparse24_gemm.py --m 1 --m 16 --json out.json
pytest bench/bench_sparse24_gemm.py       (one small case, through pytest-benchmark)

Every weight is pruned to 2:4 first, so that all contenders multiply by the same one; those of 4 bits
round it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import harness
import matmul
import ours
import torch
import typer
from bench_w4a16_gemm import GPU_ROWS, GPU_SHAPES, ROWS, SHAPES
from harness import Contender
from matmul import Method

# Of a dense weight's element in 16 bits: half the values, and a nibble for each four.
WEIGHT_BYTES = 1 + 1 / 8


def methods(skip: Sequence[str] = ()) -> list[Method]:
    """Ours, dense and sparse, and torch's, less those of the names in `skip`."""
    listed = [
        *ours.sparse24_methods(),
        matmul.dense("torch bfloat16", torch.bfloat16),
    ]
    if harness.on_gpu():
        from peers import gpu

        listed += gpu.sparse24_methods()
    else:
        listed.append(matmul.dense("torch float32", torch.float32, 1e-5))
        why = "needs a CUDA device"
        listed += [matmul.absent(f"torch 2:4 {name}", why) for name in ("cuSPARSELt", "CUTLASS")]
    return [method for method in listed if method.name not in skip]


def pytest_generate_tests(metafunc: Any) -> None:
    cases = matmul.cases(
        methods(), [(512, 256)], (4,), WEIGHT_BYTES, 1 << 20, matmul.sparse24_weight
    )
    harness.parametrize(metafunc, lambda: next(cases))


def test_contender(benchmark: Any, contender: Contender) -> None:
    harness.check_and_benchmark(benchmark, contender)


def main(
    shape: Annotated[list[str] | None, typer.Option(help="KxN, repeatable")] = None,
    m: Annotated[list[int] | None, typer.Option(help="rows of x, repeatable")] = None,
    rounds: harness.Rounds = 15,
    seconds: harness.Seconds = 10,
    skip: harness.Skip = None,
    json: harness.Json = None,
    merge: harness.Merge = False,
    device: harness.Device = "cpu",
) -> None:
    """Time the 2:4 products beside dense ones and torch's."""
    harness.use_device(device)
    gpu = harness.on_gpu()
    shapes = [matmul.parse_shape(s) for s in shape or (GPU_SHAPES if gpu else SHAPES)]
    rows = m or (GPU_ROWS if gpu else ROWS)
    ring = harness.ring_bytes()
    cases = matmul.cases(
        methods(skip or ()), shapes, rows, WEIGHT_BYTES, ring, matmul.sparse24_weight
    )
    options = harness.Options(rounds, seconds, json, merge)
    harness.run("sparse24_gemm", cases, "torch bfloat16", options)


if __name__ == "__main__":
    with torch.inference_mode():
        typer.run(main)
