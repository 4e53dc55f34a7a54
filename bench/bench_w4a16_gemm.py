"""w4a16_gemm against torch's dense and 4-bit matmuls and its peers', weights cold.

python bench/bench_w4a16_gemm.py --m 1 --m 16 --json out.json
python bench/bench_w4a16_gemm.py --shape 4096x14336 --json out.json --merge
pytest bench/bench_w4a16_gemm.py          (one small case, through pytest-benchmark)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import harness
import matmul
import ours
import torch
import typer
from harness import Contender
from matmul import Method

# K x N: of Llama-3 8B, and on a GPU of the 70B too. 4096x6144 and 4096x28672 are fused q, k, v and
# gate, up; 4096x1024 is k or v alone.
SHAPES = ("4096x4096", "4096x14336", "14336x4096")
GPU_SHAPES = (
    *("4096x1024", "4096x6144", *SHAPES, "4096x28672", "4096x128256"),
    *("8192x1024", "8192x8192", "8192x28672", "28672x8192"),
)
ROWS = (1, 4, 16, 64, 256)
GPU_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
# Codes, and a bfloat16 scale per group of 128.
WEIGHT_BYTES = 0.5 + 2 / 128


def methods(skip: Sequence[str] = ()) -> list[Method]:
    """Ours and every peer of the default device, less those of the names in `skip`."""
    if harness.on_gpu():
        from peers import gpu as peers
    else:
        from peers import cpu as peers
    return [m for m in (*ours.w4a16_methods(), *peers.all_methods()) if m.name not in skip]


def pytest_generate_tests(metafunc: Any) -> None:
    cases = matmul.cases(methods(), [(512, 256)], (4,), WEIGHT_BYTES, 1 << 20)
    harness.parametrize(metafunc, lambda: next(cases))


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
    """Time w4a16_gemm beside its peers."""
    harness.use_device(device)
    gpu = harness.on_gpu()
    shapes = [matmul.parse_shape(s) for s in shape or (GPU_SHAPES if gpu else SHAPES)]
    rows = m or (GPU_ROWS if gpu else ROWS)
    ring = 0 if warm else harness.ring_bytes()
    cases = matmul.cases(methods(skip or ()), shapes, rows, WEIGHT_BYTES, ring)
    options = harness.Options(rounds, seconds, json, merge)
    harness.run("w4a16_gemm", cases, "torch bfloat16", options)


if __name__ == "__main__":
    with torch.inference_mode():
        typer.run(main)
