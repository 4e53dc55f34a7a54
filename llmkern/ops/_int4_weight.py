"""The weight arguments that w4a16_gemm and dequantize_int4 share: checks and shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern import _backends
from llmkern._dtypes import FLOATS, dtype_name
from llmkern.formats.int4_cpu import from_cpu_layout
from llmkern.formats.int4_cuda import chunk_bytes, cuda_shape, is_symmetric
from llmkern.ops._cuda_layout import unpack_int4
from llmkern.ops._library import check_group_size, check_layout, describe, expect, pointer


def weight_shape(scales: Tensor, group_size: int, layout: str) -> tuple[int, int]:
    """(N, K) of a weight, from its scales: [N, K/group_size], transposed in kernel layouts."""
    N, groups = scales.shape if layout == "canonical" else (scales.shape[1], scales.shape[0])
    return N, groups * group_size


def check_weight(
    op: str, qweight: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, layout: str
) -> None:
    """Refuse weights that no kernel could read.

    Raises:
        ValueError: names the argument, what it was and what was expected.
    """
    check_layout(op, layout)
    check_group_size(op, group_size)
    expect(
        scales.dim() == 2 and scales.dtype in FLOATS,
        op,
        "scales",
        scales,
        "a float32, bfloat16 or float16 matrix",
    )
    N, K = weight_shape(scales, group_size, layout)
    groups = K // group_size
    shape: tuple[int, ...]
    zeros_shape: tuple[int, ...]
    if layout == "canonical":
        shape, dtype = (N, K // 8), torch.int32
        zeros_shape, zeros_dtype = (-(-N // 8), groups), torch.int32
    elif layout == "cuda":
        shape, dtype = _cuda_shape(qweight, scales, N, K, group_size), torch.uint8
        zeros_shape, zeros_dtype = (0,), torch.uint8  # they lie in qweight
    else:
        shape, dtype = (-(-N // 64), K * 32), torch.uint8
        zeros_shape, zeros_dtype = (groups, N), torch.uint8
    for name, tensor, want, kind in (
        ("qweight", qweight, shape, dtype),
        ("zeros", zeros, zeros_shape, zeros_dtype),
        ("scales", scales, scales.shape, scales.dtype),
    ):
        if tensor is None:
            continue
        # The messages cost more than the checks: they are written only for a tensor that fails.
        if tensor.dtype != kind or tensor.shape != want:
            raise ValueError(
                f"{op}: {name}: got {describe(tensor)}, expected "
                f"{dtype_name(kind)} {list(want)} (N = {N}, K = {K}, group_size = "
                f"{group_size}, {layout} layout)"
            )
        # In the cuda layout scales stands for its shape and dtype only.
        if not tensor.is_contiguous() and (layout != "cuda" or name != "scales"):
            expect(False, op, name, tensor, "a contiguous tensor")
        if tensor.device != scales.device:
            expect(False, op, name, tensor, f"the device of scales, {scales.device}")


def _cuda_shape(
    qweight: Tensor, scales: Tensor, N: int, K: int, group_size: int
) -> tuple[int, int, int]:
    """What qweight's shape must be, with zero points if its chunks are of the size that holds them."""
    width = scales.element_size()
    asymmetric = qweight.shape[-1:] == (chunk_bytes(group_size, width, False),)
    return cuda_shape(N, K, group_size, width, not asymmetric)


def refuse_cuda_weight(qweight: Tensor, layout: str) -> str | None:
    """Why the compiled CUDA kernels cannot read a weight, or None."""
    if reason := _backends.refuse_cuda(qweight.device):
        return reason
    if layout == "cpu":
        return f"the weight is in the {layout} layout"
    if qweight.data_ptr() % 16:
        return "qweight is not 16-byte aligned"
    return None


def cuda_zeros(
    qweight: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, layout: str
) -> int:
    """The zero points' address as the CUDA kernels take it: in the cuda layout any, if there are some."""
    if layout == "cuda":
        return 0 if is_symmetric(qweight, scales, group_size) else pointer(qweight)
    return pointer(zeros)


def refuse_triton_weight(qweight: Tensor, layout: str) -> str | None:
    """Why the Triton kernels cannot read a weight, or None."""
    if layout != "canonical":
        return f"the weight is in the {layout} layout"
    return _backends.refuse_triton(qweight.device)


def canonical_weight(
    qweight: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, layout: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(qweight, scales, zeros) in the canonical layout, for backends that read no other."""
    if layout == "canonical":
        return qweight, scales, zeros
    convert = from_cpu_layout if layout == "cpu" else unpack_int4
    return convert(qweight, scales, zeros, group_size)
