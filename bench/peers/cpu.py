"""The peers of the 4-bit matmuls on a CPU, as methods of `matmul`."""

from __future__ import annotations

from typing import Any

import matmul
import torch
from matmul import Method, attempt
from peers import ggml
from torch import Tensor

GROUP_SIZE, BLOCK_SIZE = 128, 64


def all_methods() -> list[Method]:
    """Every peer, those that cannot run here with the reason."""
    return [
        matmul.dense("torch float32", torch.float32, 1e-5),
        matmul.dense("torch bfloat16", torch.bfloat16),
        attempt("torch int4pack", int4pack),
        attempt("bitsandbytes nf4", bitsandbytes_nf4),
        *ggml.methods(),
    ]


def int4pack() -> Method:
    """torch's `_weight_int4pack_mm_for_cpu`; its zero point is an offset of the centre code 8."""

    def pack(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, scales = matmul.round_to_nearest(w, GROUP_SIZE)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        by_group = scales.t()
        both = torch.stack([by_group, torch.zeros_like(by_group)], -1).contiguous()
        return packed, both, matmul.from_codes(codes, scales)

    def multiply(x: Tensor, operand: tuple[Tensor, Tensor]) -> Tensor:
        packed, both = operand
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP_SIZE, both)
        return y

    return _with_dense("torch int4pack", pack, multiply)


def _with_dense(name: str, pack: Any, multiply: Any, **options: Any) -> Method:
    """A method whose `pack` returns the operand's parts and, last, the weight it stands for."""
    made: list[Tensor] = []

    def operand(w: Tensor) -> Any:
        *parts, stands_for = pack(w)
        made[:] = [stands_for]
        return tuple(parts)

    return Method(name, operand, multiply, dense=lambda parts: made.pop(), **options)


def bitsandbytes_nf4() -> Method:
    """bitsandbytes' NF4 in blocks of 64.

    Its fast path, `gemv_4bit` on a weight in a layout of its own, serves any number of rows; its
    Linear4bit goes there in eval mode where the CPU has AVX512-BF16, so the operand is taken from
    such a module after one call. A kernel from the Hub takes its place where the package `kernels`
    can fetch one.
    """
    import bitsandbytes as bnb
    from bitsandbytes import functional

    fast = bool(functional.has_avx512bf16())

    def pack(w: Tensor) -> tuple[Tensor, Any, Tensor]:
        linear = bnb.nn.Linear4bit(
            w.shape[1],
            w.shape[0],
            bias=False,
            compute_dtype=torch.bfloat16,
            compress_statistics=False,
            quant_type="nf4",
        )
        linear.weight = bnb.nn.Params4bit(
            w,
            requires_grad=False,
            compress_statistics=False,
            quant_type="nf4",
            blocksize=BLOCK_SIZE,
        )
        linear = linear.to("cpu").eval()
        state = linear.weight.quant_state
        stands_for = functional.dequantize_4bit(linear.weight.data, state).float()
        linear(torch.zeros(1, w.shape[1], dtype=torch.bfloat16))
        return linear.weight.data, linear.weight.quant_state, stands_for

    def multiply(x: Tensor, operand: tuple[Tensor, Any]) -> Tensor:
        packed, state = operand
        y: Tensor = bnb.matmul_4bit(x, packed, state)
        return y

    note = (
        None if fast else "no AVX512-BF16 here, so its fallback runs: decode, then a dense product"
    )
    return _with_dense("bitsandbytes nf4", pack, multiply, note=note)
