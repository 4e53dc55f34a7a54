"""The weight arguments that lut4_gemm and dequantize_lut4 share: checks and shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.formats.lut4_cpu import from_cpu_layout
from llmkern.ops._library import FLOATS, describe, expect

LAYOUTS = ("canonical", "cpu")


def weight_shape(qweight: Tensor, layout: str) -> tuple[int, int]:
    """(N, K) of a weight."""
    return qweight.shape[0], qweight.shape[1] * (8 if layout == "canonical" else 2)


def check_weight(
    op: str, qweight: Tensor, codebook: Tensor, scales: Tensor | None, group_size: int, layout: str
) -> None:
    """Refuse weights that no kernel could read.

    Raises:
        ValueError: names the argument, what it was and what was expected.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"{op}: layout: got {layout!r}, expected one of {', '.join(LAYOUTS)}")
    if group_size <= 0 or group_size % 32:
        raise ValueError(f"{op}: group_size: got {group_size}, expected a positive multiple of 32")
    wanted = "int32 [N, K/8]" if layout == "canonical" else "uint8 [N, K/2]"
    kind = torch.int32 if layout == "canonical" else torch.uint8
    if qweight.dim() != 2 or qweight.dtype != kind:
        expect(False, op, "qweight", qweight, f"{wanted} ({layout} layout)")
    N, K = weight_shape(qweight, layout)
    if K % group_size:
        raise ValueError(
            f"{op}: group_size: got {group_size}, expected a divisor of K = {K} (qweight "
            f"{describe(qweight)}, {layout} layout)"
        )
    groups = K // group_size
    if codebook.dtype != torch.float32 or codebook.shape not in ((16,), (N, 16), (N, groups, 16)):
        wanted = f"float32 [16], [{N}, 16] or [{N}, {groups}, 16]"
        expect(False, op, "codebook", codebook, wanted)
    if scales is not None and (scales.dtype not in FLOATS or scales.shape != (N, groups)):
        wanted = (
            f"float32, bfloat16 or float16 [{N}, {groups}] (K = {K}, group_size = {group_size})"
        )
        expect(False, op, "scales", scales, wanted)
    for name, tensor in (("qweight", qweight), ("codebook", codebook), ("scales", scales)):
        if tensor is None:
            continue
        if not tensor.is_contiguous():
            expect(False, op, name, tensor, "a contiguous tensor")
        if tensor.device != qweight.device:
            expect(False, op, name, tensor, f"the device of qweight, {qweight.device}")


def canonical_qweight(qweight: Tensor, layout: str) -> Tensor:
    """`qweight` in the canonical layout, for backends that read no other."""
    return qweight if layout == "canonical" else from_cpu_layout(qweight)
