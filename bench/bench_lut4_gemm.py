"""lut4_gemm with NF4 in blocks of 64 and with a book per row, against torch and bitsandbytes.

python bench/bench_lut4_gemm.py --m 1 --m 16 --json out.json
pytest bench/bench_lut4_gemm.py           (one small case, through pytest-benchmark)
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
from matmul import Method, attempt

# Codes, and a bfloat16 scale per block of 64. Books per row add 64 bytes a row, which is not counted.
WEIGHT_BYTES = 0.5 + 2 / 64


def methods(skip: Sequence[str] = ()) -> list[Method]:
    """Ours, torch's dense product and bitsandbytes, less those of the names in `skip`."""
    if harness.on_gpu():
        from peers import gpu as peers
    else:
        from peers import cpu as peers
    listed = [
        *ours.lut4_methods(),
        matmul.dense("torch bfloat16", torch.bfloat16),
        attempt("bitsandbytes nf4", peers.bitsandbytes_nf4),
    ]
    return [method for method in listed if method.name not in skip]


def pytest_generate_tests(metafunc: Any) -> None:
    cases = matmul.cases(methods(), [(512, 256)], (4,), WEIGHT_BYTES, 1 << 20)
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
    """Time lut4_gemm beside its peers."""
    harness.use_device(device)
    gpu = harness.on_gpu()
    shapes = [matmul.parse_shape(s) for s in shape or (GPU_SHAPES if gpu else SHAPES)]
    rows = m or (GPU_ROWS if gpu else ROWS)
    cases = matmul.cases(methods(skip or ()), shapes, rows, WEIGHT_BYTES, harness.ring_bytes())
    options = harness.Options(rounds, seconds, json, merge)
    harness.run("lut4_gemm", cases, "torch bfloat16", options)


if __name__ == "__main__":
    with torch.inference_mode():
        typer.run(main)
