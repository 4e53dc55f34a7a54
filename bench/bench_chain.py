"""The linear layers of Llama-3 8B one after the other, as a decoding step runs them.

python bench/bench_chain.py --layers 4 --m 1 --m 32 --json out.json
python bench/bench_chain.py --device cuda
pytest bench/bench_chain.py               (one small case, through pytest-benchmark)

Each layer has weights of its own for q, k, v fused, o, gate and up fused, and down; nothing else of
the model runs. The time is that of one step of M tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import bench_w4a16_gemm
import harness
import matmul
import torch
import typer
from harness import Case, Contender
from matmul import Method, Packed
from torch import Tensor

# K x N of the four products of a layer.
LAYER = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
SMALL_LAYER = ((256, 512), (512, 256))
ROWS = (1, 8, 32, 128)
CPU_LAYERS, GPU_LAYERS = 4, 32


class Chain:
    """The weights of all layers, packed by one method; products of a shape share their input."""

    def __init__(self, method: Method, weights: Sequence[Tensor], layers: int) -> None:
        self.method = method
        self.packed: list[Packed] = []
        for w in weights:
            # A ring of so many bytes has exactly one copy per layer.
            ring = layers * int(w.numel() * method.bytes_per_weight)
            self.packed.append(Packed(method, w, ring, matmul.signs(len(w))))
        self.problem = next((p.problem for p in self.packed if p.problem), None)
        self.layers = layers

    def contender(self, inputs: Sequence[Tensor]) -> Contender:
        """All layers' products; the result is that of the last layer."""
        if self.problem:
            return harness.missing(self.method.name, self.problem)
        parts = [p.contender(x) for p, x in zip(self.packed, inputs, strict=True)]

        def run(i: int) -> list[Tensor]:
            return [[part.run(layer) for part in parts] for layer in range(self.layers)][-1]

        def mismatch(out: list[Tensor]) -> str | None:
            problems = (part.mismatch(y) for part, y in zip(parts, out, strict=True))
            return next((problem for problem in problems if problem), None)

        return Contender(self.method.name, run, mismatch, self.method.ours, note=self.method.note)


def cases(
    methods: Sequence[Method], layer: Sequence[tuple[int, int]], layers: int, rows: Sequence[int]
) -> Iterator[Case]:
    """One case per number of rows; the weights are packed once."""
    torch.manual_seed(0)
    weights = [matmul.weight(N, K) for K, N in layer]
    chains = [Chain(method, weights, layers) for method in methods]
    elements = layers * sum(K * N for K, N in layer)
    ends = layers * sum(K + N for K, N in layer)
    del weights
    for M in rows:
        inputs = [torch.randn(M, K) for K, _ in layer]
        yield Case(
            f"M={M} {layers} layers",
            [chain.contender(inputs) for chain in chains],
            bytes=elements * bench_w4a16_gemm.WEIGHT_BYTES + 2 * M * ends,
            flops=2 * M * elements,
            kernels=layers * len(layer),
            tokens=M,
        )


def pytest_generate_tests(metafunc: Any) -> None:
    every = cases(bench_w4a16_gemm.methods(), SMALL_LAYER, 2, (4,))
    harness.parametrize(metafunc, lambda: next(every))


def test_contender(benchmark: Any, contender: Contender) -> None:
    harness.check_and_benchmark(benchmark, contender)


def main(
    m: Annotated[list[int] | None, typer.Option(help="rows of x, repeatable")] = None,
    layers: Annotated[
        int | None, typer.Option(help=f"[default: {CPU_LAYERS}, on a GPU {GPU_LAYERS}]")
    ] = None,
    rounds: harness.Rounds = 9,
    seconds: harness.Seconds = 30,
    skip: harness.Skip = None,
    json: harness.Json = None,
    merge: harness.Merge = False,
    device: harness.Device = "cpu",
) -> None:
    """Time the linear layers of a model beside its peers'."""
    harness.use_device(device)
    layers = layers or (GPU_LAYERS if harness.on_gpu() else CPU_LAYERS)
    if layers < 2:
        raise typer.BadParameter(f"got {layers}, expected 2 or more, for weights to be cold")
    leave_out = skip if skip is not None else ([] if harness.on_gpu() else ["torch float32"])
    every = cases(bench_w4a16_gemm.methods(leave_out), LAYER, layers, m or ROWS)
    options = harness.Options(rounds, seconds, json, merge)
    harness.run("chain", every, "torch bfloat16", options)


if __name__ == "__main__":
    with torch.inference_mode():
        typer.run(main)
