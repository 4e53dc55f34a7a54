"""This project's 4-bit products as methods of `matmul`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import matmul
import torch
from matmul import Method
from torch import Tensor

import llmkern
from llmkern._memory import empty_huge
from llmkern.formats import (
    int4_cpu,
    int4_cuda,
    lut4_cpu,
    lut4_cuda,
    sparse24_cpu,
    sparse24_cuda,
)
from llmkern.formats.int4 import pack_codes
from llmkern.formats.lut4 import CODEBOOKS, group_scales, quantize_blockwise
from llmkern.formats.sparse24 import compress, compress_codes
from llmkern.ops import lut4_gemm, sparse24_gemm, sparse24_w4a16_gemm, w4a16_gemm

GROUP_SIZE, BLOCK_SIZE = 128, 64
# Relative error of the product of a dtype's x: the rounding of its result, with room for partial sums.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
INT8_TOLERANCE = 0.02  # rounding a row of x to 8 bits alone makes an error of up to about 1 %


def another(operand: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Copies in memory of their own, on huge pages on a CPU, as a model's weights are."""
    return tuple(None if part is None else _another(part) for part in operand)


def _another(part: Tensor) -> Tensor:
    if part.device.type != "cpu" or not part.is_contiguous():
        return part.clone()
    return empty_huge(part.shape, part.dtype).copy_(part)


def w4a16_methods() -> list[Method]:
    """w4a16_gemm by every backend of the default device, in the dtypes of interest there."""
    if torch.get_default_device().type == "cuda":
        halves = (torch.bfloat16, torch.float16)
        return [
            *(w4a16_method(dtype, "cuda", "cuda") for dtype in halves),
            w4a16_method(torch.bfloat16, "canonical", "triton"),
        ]
    return [
        w4a16_method(torch.bfloat16, "cpu"),
        w4a16_method(torch.float32, "cpu"),
        w4a16_method(torch.bfloat16, "cpu", activation="int8"),
    ]


def w4a16_method(
    dtype: torch.dtype, layout: str, backend: str | None = None, activation: str = "float"
) -> Method:
    """w4a16_gemm, symmetric in groups of 128 with bfloat16 scales."""
    made: list[Tensor] = []

    def pack(w: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales = matmul.round_to_nearest(w, GROUP_SIZE)
        made[:] = [matmul.from_codes(codes, scales)]
        canonical = (pack_codes(codes, 4), scales, None)
        if layout == "canonical":
            return canonical
        convert = int4_cpu.to_cpu_layout if layout == "cpu" else int4_cuda.to_cuda_layout
        packed: tuple[Tensor | None, ...] = convert(*canonical, GROUP_SIZE)
        return packed

    def product(x: Tensor, operand: Any) -> Tensor:
        return w4a16_gemm(x, *operand, group_size=GROUP_SIZE, layout=layout, activation=activation)

    method = _method(dtype, backend, pack, product, made)
    if activation == "float":
        return method
    name = f"{method.name}, {activation} activations"
    note = "rounds the activations to 8 bits"
    return replace(method, name=name, tolerance=INT8_TOLERANCE, note=note)


def lut4_methods() -> list[Method]:
    """lut4_gemm with the NF4 book and with books per row."""
    if torch.get_default_device().type == "cuda":
        return [
            lut4_method(torch.bfloat16, layout, per_row=per_row, backend=backend)
            for layout, backend in (("cuda", "cuda"), ("canonical", "triton"))
            for per_row in (False, True)
        ]
    return [
        lut4_method(torch.bfloat16, "cpu", per_row=False),
        lut4_method(torch.bfloat16, "cpu", per_row=True),
        lut4_method(torch.float32, "cpu", per_row=False),
    ]


def lut4_method(
    dtype: torch.dtype, layout: str, *, per_row: bool, backend: str | None = None
) -> Method:
    """lut4_gemm on NF4 codes in blocks of 64; per row, each row has a book of its own."""
    made: list[Tensor] = []

    def pack(w: Tensor) -> tuple[Tensor | None, ...]:
        book = CODEBOOKS["nf4"].to(w.device)
        codes, absmax = quantize_blockwise(w, book, BLOCK_SIZE)
        scales = group_scales(absmax, BLOCK_SIZE, (w.shape[0], w.shape[1])).bfloat16()
        values = book[codes.int()].unflatten(1, (scales.shape[1], -1))
        made[:] = [(values * scales[..., None].float()).flatten(1)]
        canonical = (pack_codes(codes, 4), book.repeat(len(w), 1) if per_row else book, scales)
        if layout == "cuda":
            return lut4_cuda.to_cuda_layout(*canonical, BLOCK_SIZE)
        if layout == "cpu":
            return lut4_cpu.to_cpu_layout(canonical[0]), *canonical[1:]
        return canonical

    def product(x: Tensor, operand: Any) -> Tensor:
        return lut4_gemm(x, *operand, group_size=BLOCK_SIZE, layout=layout)

    return _method(dtype, backend, pack, product, made, " row books" if per_row else " nf4")


def sparse24_methods() -> list[Method]:
    """sparse24_gemm and sparse24_w4a16_gemm, and w4a16_gemm on the same weight."""
    bf16, fp16 = torch.bfloat16, torch.float16
    if torch.get_default_device().type == "cuda":
        return [
            *(sparse24_method(dtype, "cuda", backend="cuda") for dtype in (bf16, fp16)),
            sparse24_method(bf16, "cuda", codes=True, backend="cuda"),
            sparse24_method(bf16, "canonical", backend="triton"),
            sparse24_method(bf16, "canonical", codes=True, backend="triton"),
            w4a16_method(bf16, "cuda", "cuda"),
        ]
    return [
        *(sparse24_method(dtype, "cpu") for dtype in (bf16, torch.float32)),
        *(sparse24_method(dtype, "cpu", codes=True) for dtype in (bf16, torch.float32)),
        w4a16_method(bf16, "cpu"),
    ]


def sparse24_method(
    dtype: torch.dtype, layout: str, *, codes: bool = False, backend: str | None = None
) -> Method:
    """sparse24_gemm, or with 4-bit codes in groups of 128 sparse24_w4a16_gemm, of a 2:4 weight."""
    made: list[Tensor] = []

    def pack(w: Tensor) -> tuple[Tensor | None, ...]:
        if not codes:
            made[:] = [w.to(dtype)]
            canonical = compress(w.to(dtype))
            return SPARSE24_LAYOUTS[layout][0](*canonical)
        mask = w != 0
        dense_codes, scales = matmul.round_to_nearest(w, GROUP_SIZE)
        made[:] = [matmul.from_codes(dense_codes, scales) * mask]
        qvalues, meta = compress_codes(dense_codes, mask)
        return SPARSE24_LAYOUTS[layout][1](qvalues, meta, scales, None, GROUP_SIZE)

    def product(x: Tensor, operand: Any) -> Tensor:
        if codes:
            return sparse24_w4a16_gemm(x, *operand, group_size=GROUP_SIZE, layout=layout)
        return sparse24_gemm(x, *operand, layout=layout)

    method = _method(dtype, backend, pack, product, made, " 2:4 int4" if codes else " 2:4")
    width = dtype.itemsize / 2
    return replace(method, bytes_per_weight=0.25 + 1 / 8 if codes else width + 1 / 8)


# By layout: how values, and how codes come into it.
SPARSE24_LAYOUTS: dict[str, tuple[Any, Any]] = {
    "canonical": (lambda *weight: weight, lambda *weight: weight[:-1]),
    "cpu": (sparse24_cpu.to_cpu_layout, sparse24_cpu.int4_to_cpu_layout),
    "cuda": (sparse24_cuda.to_cuda_layout, sparse24_cuda.int4_to_cuda_layout),
}


def _method(
    dtype: torch.dtype,
    backend: str | None,
    pack: Any,
    product: Any,
    made: list[Tensor],
    what: str = "",
) -> Method:
    def forced(x: Tensor, operand: Any) -> Tensor:
        with llmkern.use_backend(backend or ""):
            y: Tensor = product(x, operand)
        return y

    name = f"llmkern{f' {backend}' if backend else ''}{what} {str(dtype).removeprefix('torch.')}"
    return Method(
        name,
        pack,
        forced if backend else product,
        dense=lambda operand: made.pop(),
        x_dtype=dtype,
        tolerance=TOLERANCE[dtype],
        copy=another,
        ours=True,
    )
