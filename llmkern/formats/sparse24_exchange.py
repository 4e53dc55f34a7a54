"""2:4 weights from and to other libraries' layouts: torch's semi-structured tensors, bitmasks.

torch. `SparseSemiStructuredTensorCUTLASS` holds the kept values in the order of ours, and the same
nibbles in 16-bit words whose places CUTLASS permutes; it can be made and read on any device. In float32
it keeps one of every 2 columns instead. `SparseSemiStructuredTensorCUSPARSELT` is compressed by a
closed library on the GPU into one tensor, whose metadata no document describes: it is read through its
own `to_dense`, and made by `torch.sparse.to_sparse_semi_structured(decompress(...))`, both on a GPU.

Bitmask. compressed-tensors' former `sparse-24-bitmask` files hold, for a weight named p:

    p.compressed   float [N, K/2]          the kept values in row order
    p.bitmask      uint8 [N, ceil(K/8)]    bit k % 8 of byte k // 8 set where column k is kept
    p.shape        int64 [2, 1]            N, K

For tensors that a caller holds: `llmkern.load` refuses such files, and saves 2:4 weights as dense ones.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmkern.formats.sparse24 import (
    check_meta,
    check_parts,
    compress,
    kept_places,
    mask_of,
)


def _cutlass_order(rows: int, words: int) -> Tensor:
    """Place of the 16-bit word (row, word) of plain metadata in CUTLASS's, int64 [rows * words].

    CUTLASS interleaves the rows of 32, swaps the corners of 2 by 2 blocks, and stores pairs of columns
    one after another (include/cutlass/util/host_reorder.h).
    """
    row = torch.arange(rows)[:, None]
    word = torch.arange(words)[None, :]
    row = row // 32 * 32 + row % 8 * 4 + row % 32 // 8
    swap = torch.where(row % 2 < word % 2, 1, 0) - torch.where(row % 2 > word % 2, 1, 0)
    row, word = row + swap, word - swap
    return (word // 2 * rows * 2 + row * 2 + word % 2).reshape(-1)


def from_torch(sparse: Tensor) -> tuple[Tensor, Tensor]:
    """A torch `SparseSemiStructuredTensor` [N, K] to (values, meta) of the canonical layout.

    Raises:
        ValueError: `sparse` is none, or is int8.
        RuntimeError: a cuSPARSELt tensor on a machine without it.
    """
    kind = torch.sparse.SparseSemiStructuredTensor
    if not isinstance(sparse, kind) or sparse.dtype == torch.int8:
        raise ValueError(
            f"sparse: got {type(sparse).__name__} of {sparse.dtype}, expected torch's "
            "SparseSemiStructuredTensor of a float dtype"
        )
    packed, reordered = sparse.packed, sparse.meta
    if not isinstance(sparse, torch.sparse.SparseSemiStructuredTensorCUTLASS) or reordered is None:
        return compress(sparse.to_dense())  # type: ignore[no-untyped-call]
    assert packed is not None
    rows, words = reordered.shape
    order = _cutlass_order(rows, words).to(reordered.device)
    meta = reordered.reshape(-1)[order].view(rows, words).view(torch.uint8)
    if sparse.dtype != torch.float32:
        return packed.contiguous(), meta.contiguous()
    # One of two: a nibble says 0x4 for the first and 0xE for the second, and two make a group of 4.
    second = torch.stack((meta & 15, meta >> 4), -1).view(rows, -1, 2) == 0xE
    nibbles = second[..., 0] | (second[..., 1].to(torch.uint8) + 2) << 2
    pairs = nibbles.view(rows, -1, 2)
    return packed.contiguous(), pairs[..., 0] | pairs[..., 1] << 4


def to_torch(values: Tensor, meta: Tensor) -> Tensor:
    """(values, meta) of the canonical layout as a torch `SparseSemiStructuredTensorCUTLASS`.

    Args:
        values: bfloat16 or float16 [N, K/2], N a multiple of 32, K of 64; or float32, K a multiple of
            32, which may keep one of every 2 columns only.
        meta: uint8 [N, K/8].

    Raises:
        ValueError: a shape is not as above, or a float32 weight keeps both of 2 columns (named).
    """
    N, octets = check_parts("values", values, meta, 4)
    check_meta(meta)
    wide = values.dtype == torch.float32
    if N % 32 or 8 * octets % (32 if wide else 64):
        raise ValueError(
            f"values: got N = {N}, K = {8 * octets}, expected multiples of 32 and "
            f"{32 if wide else 64}: torch's CUTLASS layout has no others"
        )
    words = meta
    if wide:
        places = kept_places(meta)
        bad = (places[..., 0] > 1) | (places[..., 1] < 2)
        if bool(bad.any()):
            row, group = divmod(int(bad.view(-1).int().argmax()), bad.shape[1])
            raise ValueError(
                f"meta: got 2 kept of 2 in row {row}, columns {4 * group} .. {4 * group + 3}, expected "
                "1 of every 2: torch's float32 layout keeps no more"
            )
        halves = torch.stack((places[..., 0] == 1, places[..., 1] == 3), -1)
        nibbles = torch.where(halves, 0xE, 0x4).to(torch.uint8).view(N, -1, 2)
        words = nibbles[..., 0] | nibbles[..., 1] << 4
    words = words.contiguous().view(torch.int16)
    order = _cutlass_order(*words.shape).to(words.device)
    reordered = torch.empty_like(words).view(-1)
    reordered[order] = words.view(-1)
    return torch.sparse.SparseSemiStructuredTensorCUTLASS(
        torch.Size((N, 8 * octets)), values, reordered.view_as(words), None, None, None
    )


def from_bitmask(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A weight of a `sparse-24-bitmask` file to (values, meta) of the canonical layout.

    Args:
        tensors: "compressed", "bitmask" and "shape", as above.

    Raises:
        ValueError: one is missing or does not fit the others; more than two of some 4 columns kept.
    """
    missing = {"compressed", "bitmask", "shape"} - set(tensors)
    if missing:
        raise ValueError(
            f"tensors: got no {sorted(missing)[0]}, expected compressed, bitmask, shape"
        )
    values, bitmask = tensors["compressed"], tensors["bitmask"]
    N, K = (int(size) for size in tensors["shape"].flatten())
    if K % 8 or tuple(values.shape) != (N, K // 2) or tuple(bitmask.shape) != (N, K // 8):
        raise ValueError(
            f"compressed, bitmask: got {list(values.shape)} and {list(bitmask.shape)}, expected "
            f"[{N}, {K // 2}] and [{N}, {-(-K // 8)}] of the shape, K a multiple of 8"
        )
    bits = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    mask = (bitmask[..., None] >> bits & 1).view(N, K).bool()
    short = mask.view(N, -1, 4).sum(-1) != 2
    if bool(short.any()):
        row, group = divmod(int(short.view(-1).int().argmax()), K // 4)
        raise ValueError(
            f"bitmask: got {int(mask[row, 4 * group : 4 * group + 4].sum())} kept of 4 in row {row}, "
            f"columns {4 * group} .. {4 * group + 3}, expected exactly 2"
        )
    dense = values.new_zeros(N, K)
    dense[mask] = values.reshape(-1)
    return compress(dense, mask)


def to_bitmask(values: Tensor, meta: Tensor) -> dict[str, Tensor]:
    """(values, meta) of the canonical layout as the tensors of a `sparse-24-bitmask` file."""
    N, octets = check_parts("values", values, meta, 4)
    bits = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=meta.device)
    bitmask = (mask_of(meta).view(N, octets, 8) * bits).sum(-1, dtype=torch.uint8)
    return {
        "compressed": values.contiguous(),
        "bitmask": bitmask,
        "shape": torch.tensor([[N], [8 * octets]]),
    }
