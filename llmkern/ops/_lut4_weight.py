"""The weight arguments that lut4_gemm and dequantize_lut4 share: checks and shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern._dtypes import FLOAT_NAMES, FLOATS
from llmkern.formats.lut4_cpu import from_cpu_layout
from llmkern.formats.lut4_cuda import cuda_shape, has_scales
from llmkern.ops._cuda_layout import unpack_lut4
from llmkern.ops._library import check_group_size, check_layout, describe, expect, pointer
from llmkern.ops._w4a16_config import Chunks


def weight_shape(
    qweight: Tensor, scales: Tensor | None, group_size: int, layout: str
) -> tuple[int, int]:
    """(N, K) of a weight."""
    if layout == "cuda":
        assert scales is not None
        return scales.shape[1], scales.shape[0] * group_size
    return qweight.shape[0], qweight.shape[1] * (8 if layout == "canonical" else 2)


def check_weight(
    op: str, qweight: Tensor, codebook: Tensor, scales: Tensor | None, group_size: int, layout: str
) -> None:
    """Refuse weights that no kernel could read.

    Raises:
        ValueError: names the argument, what it was and what was expected.
    """
    check_layout(op, layout)
    check_group_size(op, group_size)
    cuda = layout == "cuda"
    if cuda and (scales is None or scales.dim() != 2 or scales.dtype not in FLOATS):
        wanted = "float32, bfloat16 or float16 [K/group_size, N] (cuda layout)"
        expect(False, op, "scales", scales, wanted)
    if not cuda:
        _check_rows(op, qweight, group_size, layout)
    N, K = weight_shape(qweight, scales, group_size, layout)
    groups = K // group_size
    if codebook.dtype != torch.float32 or codebook.shape not in ((16,), (N, 16), (N, groups, 16)):
        wanted = f"float32 [16], [{N}, 16] or [{N}, {groups}, 16]"
        expect(False, op, "codebook", codebook, wanted)
    if cuda:
        assert scales is not None
        _check_chunks(op, qweight, codebook, scales, group_size)
    elif scales is not None and (scales.dtype not in FLOATS or scales.shape != (N, groups)):
        wanted = (
            f"float32, bfloat16 or float16 [{N}, {groups}] (K = {K}, group_size = {group_size})"
        )
        expect(False, op, "scales", scales, wanted)
    for name, tensor in (("qweight", qweight), ("codebook", codebook), ("scales", scales)):
        if tensor is None:
            continue
        # In the cuda layout scales and books of groups stand for their shape and dtype only.
        if not tensor.is_contiguous() and not (cuda and (name == "scales" or tensor.dim() == 3)):
            expect(False, op, name, tensor, "a contiguous tensor")
        if tensor.device != qweight.device:
            expect(False, op, name, tensor, f"the device of qweight, {qweight.device}")


def _check_rows(op: str, qweight: Tensor, group_size: int, layout: str) -> None:
    """Layouts in which rows stay rows."""
    wanted = "int32 [N, K/8]" if layout == "canonical" else "uint8 [N, K/2]"
    kind = torch.int32 if layout == "canonical" else torch.uint8
    if qweight.dim() != 2 or qweight.dtype != kind:
        expect(False, op, "qweight", qweight, f"{wanted} ({layout} layout)")
    _, K = weight_shape(qweight, None, group_size, layout)
    if K % group_size:
        raise ValueError(
            f"{op}: group_size: got {group_size}, expected a divisor of K = {K} (qweight "
            f"{describe(qweight)}, {layout} layout)"
        )


def _check_chunks(
    op: str, qweight: Tensor, codebook: Tensor, scales: Tensor, group_size: int
) -> None:
    N, K = weight_shape(qweight, scales, group_size, "cuda")
    books = codebook.dim() == 3
    shapes = [cuda_shape(N, K, group_size, width, books) for width in (scales.element_size(), 0)]
    if qweight.dtype != torch.uint8 or qweight.shape not in shapes:
        wanted = f"uint8 {list(shapes[0])} or {list(shapes[1])} (N = {N}, K = {K}, cuda layout)"
        expect(False, op, "qweight", qweight, wanted)
    if not qweight.is_contiguous():
        expect(False, op, "qweight", qweight, "a contiguous tensor")


def book_strides(codebook: Tensor, K: int, group_size: int) -> tuple[int, int]:
    """Entries between the books of two rows and of two groups; 0 where it is the same book."""
    if codebook.dim() == 3:
        return K // group_size * 16, 16
    return (16, 0) if codebook.dim() == 2 else (0, 0)


def scales_name(scales: Tensor | None) -> str:
    """The dtype of the scales as the compiled kernels take it; any if there are none."""
    return FLOAT_NAMES[torch.float32 if scales is None else scales.dtype]


def cuda_scales(
    qweight: Tensor, codebook: Tensor, scales: Tensor | None, group_size: int, layout: str
) -> int:
    """The scales' address as the CUDA kernels take it: in the cuda layout any, if there are some."""
    if layout == "cuda":
        return pointer(qweight) if has_scales(qweight, codebook, group_size) else 0
    return pointer(scales)


def cuda_chunks(qweight: Tensor, codebook: Tensor) -> Chunks:
    """What the choice of a tile depends on; the tables are those of csrc/cuda/lut4_tensor_core.cuh."""
    # Of one book: 256 pairs of 4 bytes per bank. Of books of rows: 17 floats each.
    tables = {1: (256 * 32 * 4,) * 2, 2: (64 * 17 * 4, 128 * 17 * 4), 3: (0, 0)}
    return Chunks(qweight.shape[-1], tables[codebook.dim()])


def canonical_weight(
    qweight: Tensor, codebook: Tensor, scales: Tensor | None, group_size: int, layout: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(qweight, codebook, scales) in the canonical layout, for backends that read no other."""
    if layout == "cuda":
        assert scales is not None
        return unpack_lut4(qweight, codebook, scales, group_size)
    return qweight if layout == "canonical" else from_cpu_layout(qweight), codebook, scales
