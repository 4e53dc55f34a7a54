"""4-bit weights of bitsandbytes (NF4, FP4) to the canonical layout of `llmkern.formats.lut4` and back.

What a checkpoint holds of one linear layer, by the name that follows the module's:

    weight                                uint8 [ceil(N * K / 2), 1]   row-major; byte j: code 2j in the
                                          high, code 2j + 1 in the low nibble
    weight.absmax                         float32, or uint8 when nested [ceil(N * K / blocksize)]
    weight.quant_map                      float32 [16]
    weight.nested_absmax                  float32 [ceil(blocks / nested_blocksize)]
    weight.nested_quant_map               float32 [256]
    weight.quant_state.bitsandbytes__nf4  (or __fp4) uint8: JSON with quant_type, blocksize, dtype, shape
                                          and, when nested, nested_blocksize, nested_dtype, nested_offset

Nested scales are decoded when read, absmax = nested_quant_map[code] * nested_absmax + nested_offset, and
written plain. The rest of a checkpoint is in `llmkern.wire.bitsandbytes`. Checked against bitsandbytes
0.50.2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmkern._dtypes import dtype_name
from llmkern.formats.lut4 import (
    CODEBOOKS,
    Lut4Weight,
    block_scales,
    check_codebook,
    codebook_name,
    group_scales,
    group_size_of,
)

_STATE = "quant_state.bitsandbytes__"


def from_bitsandbytes(tensors: Mapping[str, Tensor]) -> Lut4Weight:
    """Read one layer's tensors.

    Args:
        tensors: by the names of the module docstring ("weight", "weight.absmax", ...); others, such
            as "bias", are ignored.

    Returns:
        The weight, with float32 scales; qweight and codebook on the device of "weight".

    Raises:
        ValueError: a tensor is missing or does not fit the others; blocks that end inside the 32
            columns which kernels read at once.
    """
    state = _read_state(tensors)
    try:
        N, K = (int(size) for size in state["shape"])
        block, dtype = int(state["blocksize"]), getattr(torch, state["dtype"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"weight.quant_state: got {state}, expected shape [N, K], blocksize and dtype"
        ) from error
    packed = _get(tensors, "weight").contiguous().view(torch.uint8).view(-1)
    codebook = _get(tensors, "weight.quant_map")
    check_codebook(codebook)
    group_size = group_size_of(block, K)
    if packed.numel() != N * K // 2:
        raise ValueError(
            f"weight: got {packed.numel()} bytes, expected {N * K // 2} for the shape [{N}, {K}]"
        )
    absmax = _read_absmax(tensors, state)
    blocks = -(-N * K // block)
    if absmax.numel() != blocks:
        raise ValueError(
            f"weight.absmax: got {absmax.numel()} entries, expected {blocks} blocks of {block}"
        )
    qweight = (packed << 4 | packed >> 4).view(N, K // 2).view(torch.int32)
    scales = group_scales(absmax, block, (N, K))
    return Lut4Weight(qweight, codebook, scales, group_size, block, dtype)


def to_bitsandbytes(weight: Lut4Weight) -> dict[str, Tensor]:
    """Write one layer's tensors, as bitsandbytes and transformers read them.

    Args:
        weight: with one NF4 or FP4 book, scales, and a block_size.

    Returns:
        Tensors by the names of the module docstring, scales plain in float32.

    Raises:
        ValueError: another book, no scales, or scales that differ inside a block.
    """
    kind = codebook_name(weight.codebook)
    if kind is None or weight.scales is None:
        raise ValueError(
            f"codebook, scales: got {list(weight.codebook.shape)} and "
            f"{'none' if weight.scales is None else 'some'}, expected the NF4 or FP4 table of "
            "bitsandbytes for the whole weight and scales: its files hold nothing else"
        )
    N, K = weight.qweight.shape[0], 8 * weight.qweight.shape[1]
    block = weight.block_size or weight.group_size
    state = {
        "quant_type": kind,
        "blocksize": block,
        "dtype": dtype_name(weight.dtype),
        "shape": [N, K],
    }
    octets = weight.qweight.contiguous().view(torch.uint8).view(-1, 1)
    return {
        "weight": octets << 4 | octets >> 4,
        "weight.absmax": block_scales(weight.scales.float(), block, (N, K)),
        "weight.quant_map": weight.codebook.clone(),
        f"weight.{_STATE}{kind}": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8, device=weight.qweight.device
        ),
    }


def _get(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"{name}: got none, expected bitsandbytes' tensor of this name")
    return tensors[name]


def _read_state(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    for kind in CODEBOOKS:
        if (packed := tensors.get(f"weight.{_STATE}{kind}")) is not None:
            return dict(json.loads(bytes(packed.cpu().tolist())))
    raise ValueError(
        f"weight.{_STATE}nf4: got neither this nor its fp4 sibling, expected bitsandbytes' 4-bit state"
    )


def _read_absmax(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Tensor:
    absmax = _get(tensors, "weight.absmax")
    if absmax.dtype != torch.uint8:
        return absmax.float()
    book, scales = _get(tensors, "weight.nested_quant_map"), _get(tensors, "weight.nested_absmax")
    if "nested_offset" not in state or "nested_blocksize" not in state:
        raise ValueError(
            f"weight.quant_state: got {dict(state)}, expected nested_offset and nested_blocksize, for "
            "weight.absmax is uint8"
        )
    per_block = scales.float().repeat_interleave(int(state["nested_blocksize"]))
    decoded = book.float()[absmax.int()] * per_block[: absmax.numel()]
    return decoded + torch.tensor(float(state["nested_offset"]), device=decoded.device)
