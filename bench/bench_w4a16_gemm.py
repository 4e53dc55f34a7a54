"""w4a16_gemm against torch's dense and 4-bit matmuls, weights cold.

python bench/bench_w4a16_gemm.py --m 1 --m 16 --json out.json
pytest bench/bench_w4a16_gemm.py          (one small case, through pytest-benchmark)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import harness
import torch
import torch.nn.functional as F
import typer
from harness import Case, Contender
from torch import Tensor

from llmkern.formats.int4 import pack_codes
from llmkern.formats.int4_cpu import to_cpu_layout
from llmkern.ops import w4a16_gemm
from llmkern.reference.w4a16_gemm import dequantize_int4

GROUP_SIZE = 128
SHAPES = ("4096x4096", "4096x14336", "14336x4096")
ROWS = (1, 4, 16, 64, 256)
# Relative error a contender may have from the exact product of the weight it was given: its dtype's
# rounding of the inputs of a dot product, with room for the order of additions.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class Ring:
    """Distinct copies of one contender's weight, made on first use."""

    def __init__(self, make: Callable[[], Any], nbytes: int, ring_bytes: int) -> None:
        self._make = make
        self._copies = harness.copies(nbytes, ring_bytes)
        self._items: list[Any] = []

    def __getitem__(self, i: int) -> Any:
        while len(self._items) < self._copies:
            self._items.append(self._make())
        return self._items[i % self._copies]


def _llmkern(
    x: Tensor, weight: tuple[Tensor, Tensor, Tensor | None], w: Tensor, ring_bytes: int
) -> Contender:
    layout = "cpu" if x.device.type == "cpu" else "canonical"

    def make() -> tuple[Tensor, ...]:
        if layout == "canonical":
            return tuple(t.clone() for t in weight if t is not None)
        # Packing anew, not cloning, puts each copy on huge pages, as a model's weights are.
        return to_cpu_layout(*weight, GROUP_SIZE)

    ring = Ring(make, w.numel() // 2, ring_bytes)

    def run(i: int) -> Tensor:
        return w4a16_gemm(x, *ring[i], group_size=GROUP_SIZE, layout=layout)

    name = f"llmkern {str(x.dtype).removeprefix('torch.')}"
    spec = x.double() @ w.double().t()
    return Contender(name, run, harness.close_to(spec, TOLERANCE[x.dtype]), ours=True)


def _torch_dense(x: Tensor, w: Tensor, ring_bytes: int) -> Contender:
    w = w.to(x.dtype)
    ring = Ring(w.clone, w.nbytes, ring_bytes)
    name = f"torch {str(x.dtype).removeprefix('torch.')}"
    mismatch = harness.close_to(x.double() @ w.double().t(), TOLERANCE[x.dtype])
    return Contender(name, lambda i: F.linear(x, ring[i]), mismatch)


def _aten_int4pack(
    x: Tensor, codes: Tensor, scales: Tensor, w: Tensor, ring_bytes: int
) -> Contender:
    if x.device.type != "cpu":
        return harness.missing("aten int4pack", "its GPU kernel reads another layout")
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    s = scales.t().to(x.dtype)
    # Its zero point is an offset of the centre code 8: none for a symmetric weight.
    scales_and_zeros = torch.stack([s, torch.zeros_like(s)], -1).contiguous()
    ring = Ring(lambda: (packed.clone(), scales_and_zeros.clone()), packed.nbytes, ring_bytes)

    def run(i: int) -> Tensor:
        q, sz = ring[i]
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, q, GROUP_SIZE, sz)
        return out

    mismatch = harness.close_to(x.double() @ w.double().t(), TOLERANCE[x.dtype])
    return Contender("aten int4pack", run, mismatch)


def _bitsandbytes_nf4(x: Tensor, w: Tensor, ring_bytes: int) -> Contender:
    try:
        from bitsandbytes import functional as bnb
        from bitsandbytes import matmul_4bit
    except ImportError as error:
        return harness.missing("bitsandbytes nf4", str(error))

    def make() -> tuple[Tensor, Any]:
        packed, state = bnb.quantize_4bit(w.bfloat16(), blocksize=64, quant_type="nf4")
        return packed, state

    packed, state = make()
    ring = Ring(make, packed.nbytes, ring_bytes)
    spec = x.double() @ bnb.dequantize_4bit(packed, state).double().t()

    def run(i: int) -> Tensor:
        q, quant_state = ring[i]
        out: Tensor = matmul_4bit(x, q.t(), quant_state)
        return out

    return Contender("bitsandbytes nf4", run, harness.close_to(spec, TOLERANCE[x.dtype]))


def make_case(M: int, K: int, N: int, ring_bytes: int = harness.RING_BYTES) -> Case:
    """The product x [M, K] with a weight [N, K] in groups of 128, by every contender."""
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8)
    scales = (torch.rand(N, K // GROUP_SIZE) * 0.01 + 0.005).bfloat16()
    qweight = pack_codes(codes, 4)
    w = dequantize_int4(qweight, scales, None, GROUP_SIZE, torch.float32)
    x = torch.randn(M, K)
    half = x.bfloat16()
    return Case(
        f"M={M} K={K} N={N}",
        [
            _llmkern(half, (qweight, scales, None), w, ring_bytes),
            _llmkern(x, (qweight, scales, None), w, ring_bytes),
            _torch_dense(x, w, ring_bytes),
            _torch_dense(half, w, ring_bytes),
            _aten_int4pack(half, codes, scales, w, ring_bytes),
            _bitsandbytes_nf4(half, w, ring_bytes),
        ],
        bytes=qweight.nbytes + scales.nbytes + half.nbytes + 2 * M * N,
        flops=2 * M * N * K,
    )


def pytest_generate_tests(metafunc: Any) -> None:
    harness.parametrize(metafunc, lambda: make_case(4, 256, 512, ring_bytes=1 << 20))


def test_contender(benchmark: Any, contender: Contender) -> None:
    harness.check_and_benchmark(benchmark, contender)


def main(
    shape: Annotated[list[str] | None, typer.Option(help="KxN, repeatable")] = None,
    m: Annotated[list[int] | None, typer.Option(help="rows of x, repeatable")] = None,
    rounds: Annotated[int, typer.Option(help="visits per contender")] = 15,
    json: Annotated[Path | None, typer.Option(help="write the results to this file")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Time w4a16_gemm beside its peers."""

    def cases() -> Iterator[Case]:
        for text in shape or SHAPES:
            K, N = (int(part) for part in text.split("x"))
            for M in m or ROWS:
                yield make_case(M, K, N)

    torch.set_default_device(device)
    options = harness.Options(rounds=rounds, json_path=json)
    harness.run("w4a16_gemm", cases(), "torch bfloat16", options)


if __name__ == "__main__":
    typer.run(main)
