"""The weight arguments of the 2:4 sparse ops: checks, shapes and layouts."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern import _backends
from llmkern._dtypes import FLOATS, dtype_name
from llmkern.formats import sparse24_cpu, sparse24_cuda
from llmkern.ops._library import check_group_size, check_layout, describe, expect


def weight_shape(values: Tensor, meta: Tensor, layout: str) -> tuple[int, int]:
    """(N, K) of a weight of floats; in the cuda layout `meta` stands for its shape."""
    if layout == "cpu":
        return 16 * values.shape[0], 4 * values.shape[1]
    N, octets = meta.shape if layout == "canonical" else (meta.shape[1], meta.shape[0])
    return N, 8 * octets


def int4_weight_shape(scales: Tensor, group_size: int, layout: str) -> tuple[int, int]:
    """(N, K) of a weight of codes, from its scales: [N, K/group_size], transposed in kernel layouts."""
    N, groups = scales.shape if layout == "canonical" else (scales.shape[1], scales.shape[0])
    return N, groups * group_size


def check_weight(op: str, values: Tensor, meta: Tensor, layout: str) -> None:
    """Refuse weights of floats that no kernel could read.

    Raises:
        ValueError: names the argument, what it was and what was expected.
    """
    check_layout(op, layout)
    dims = {"canonical": (2, 2), "cpu": (3, 3), "cuda": (3, 2)}[layout]
    expect(
        values.dim() == dims[0] and values.dtype in FLOATS,
        op,
        "values",
        values,
        f"float32, bfloat16 or float16 of {dims[0]} dimensions ({layout} layout)",
    )
    kind = torch.int32 if layout == "cpu" else torch.uint8
    wanted = f"{dtype_name(kind)} of {dims[1]} dimensions ({layout} layout)"
    expect(meta.dim() == dims[1] and meta.dtype == kind, op, "meta", meta, wanted)
    if layout == "cuda" and values.dtype == torch.float32:
        expect(False, op, "values", values, "bfloat16 or float16 (cuda layout)")
    N, K = weight_shape(values, meta, layout)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
        "canonical": ((N, K // 2), (N, K // 8)),
        "cpu": ((N // 16, K // 4, 32), (N // 16, K // 32, 16)),
        "cuda": (sparse24_cuda.cuda_shape(N, K), (K // 8, N)),
    }
    for which, tensor, shape in zip(
        ("values", "meta"), (values, meta), shapes[layout], strict=True
    ):
        if tensor.shape != shape:
            expect(False, op, which, tensor, f"{list(shape)} (N = {N}, K = {K}, {layout} layout)")
        # In the cuda layout meta stands for its shape only.
        if not tensor.is_contiguous() and (layout != "cuda" or which != "meta"):
            expect(False, op, which, tensor, "a contiguous tensor")
    if meta.device != values.device:
        expect(False, op, "meta", meta, f"the device of values, {values.device}")


def check_int4_weight(
    op: str,
    qvalues: Tensor,
    meta: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    layout: str,
) -> None:
    """Refuse weights of codes that no kernel could read.

    Raises:
        ValueError: names the argument, what it was and what was expected.
    """
    check_layout(op, layout)
    check_group_size(op, group_size)
    wanted = "a float32, bfloat16 or float16 matrix"
    expect(scales.dim() == 2 and scales.dtype in FLOATS, op, "scales", scales, wanted)
    N, K = int4_weight_shape(scales, group_size, layout)
    for name, tensor, kind, shape in (
        ("qvalues", qvalues, *_qvalues(qvalues, scales, group_size, layout)),
        ("meta", meta, *_meta(N, K, layout)),
        ("zeros", zeros, *_zeros(N, K // group_size, layout)),
        ("scales", scales, scales.dtype, tuple(scales.shape)),
    ):
        if tensor is None:
            continue
        # The messages cost more than the checks: they are written only for a tensor that fails.
        if tensor.dtype != kind or tensor.shape != shape:
            raise ValueError(
                f"{op}: {name}: got {describe(tensor)}, expected "
                f"{dtype_name(kind)} {list(shape)} (N = {N}, K = {K}, group_size = "
                f"{group_size}, {layout} layout)"
            )
        # In the cuda layout these two stand for their shape and dtype only.
        if not tensor.is_contiguous() and (layout != "cuda" or name in ("qvalues", "zeros")):
            expect(False, op, name, tensor, "a contiguous tensor")
        if tensor.device != scales.device:
            expect(False, op, name, tensor, f"the device of scales, {scales.device}")


def _qvalues(
    qvalues: Tensor, scales: Tensor, group_size: int, layout: str
) -> tuple[torch.dtype, tuple[int, ...]]:
    N, K = int4_weight_shape(scales, group_size, layout)
    if layout == "canonical":
        return torch.int32, (N, K // 16)
    if layout == "cpu":
        return torch.int32, (N // 16, K // 16, 16)
    width = scales.element_size()
    # With zero points if its chunks are of the size that holds them.
    asymmetric = qvalues.shape[-1:] == (sparse24_cuda.chunk_bytes(group_size, width, False),)
    return torch.uint8, sparse24_cuda.int4_cuda_shape(N, K, group_size, width, not asymmetric)


def _meta(N: int, K: int, layout: str) -> tuple[torch.dtype, tuple[int, ...]]:
    if layout == "canonical":
        return torch.uint8, (N, K // 8)
    return (torch.int32, (N // 16, K // 32, 16)) if layout == "cpu" else (torch.uint8, (K // 8, N))


def _zeros(N: int, groups: int, layout: str) -> tuple[torch.dtype, tuple[int, ...]]:
    if layout == "canonical":
        return torch.int32, (-(-N // 8), groups)
    return torch.uint8, ((groups, N) if layout == "cpu" else (0,))  # cuda: they lie in qvalues


def refuse_cuda_layout(layout: str) -> str | None:
    """Why the CPU kernels cannot read a weight, or None."""
    return f"the weight is in the {layout} layout" if layout == "cuda" else None


def refuse_cuda_weight(x: Tensor, weight: Tensor, layout: str) -> str | None:
    """Why the compiled CUDA kernels cannot serve a product, or None."""
    if reason := _backends.refuse_cuda(x.device):
        return reason
    if layout != "cuda":
        return f"the weight is in the {layout} layout"
    if x.dtype == torch.float32:
        return "x is float32"
    if weight.data_ptr() % 16:
        return "the weight is not 16-byte aligned"
    return None


def canonical_weight(values: Tensor, meta: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """(values, meta) in the canonical layout, for backends that read no other."""
    if layout == "canonical":
        return values, meta
    convert = sparse24_cpu.from_cpu_layout if layout == "cpu" else sparse24_cuda.from_cuda_layout
    return convert(values, meta)


def canonical_int4_weight(
    qvalues: Tensor,
    meta: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(qvalues, meta, scales, zeros) in the canonical layout, for backends that read no other."""
    if layout == "canonical":
        return qvalues, meta, scales, zeros
    if layout == "cpu":
        return sparse24_cpu.int4_from_cpu_layout(qvalues, meta, scales, zeros, group_size)
    return sparse24_cuda.int4_from_cuda_layout(qvalues, meta, scales, zeros, group_size)
