"""What compressed-tensors' files have beyond the canonical tensors: their config, and an old packing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmkern.formats.int4 import QuantFormat, pack_codes

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"


def describe_formats(formats: Mapping[str, QuantFormat], dense: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a model whose weights are packed.

    A single format is written as the class name `Linear` with the dense linears ignored, which is how
    the field's own checkpoints look; several are written as one group each, naming their modules.

    Args:
        formats: the format of each quantized module, by its full name.
        dense: full names of the linear modules that stay dense.

    Returns:
        A JSON-serialisable dict.
    """
    by_format: dict[QuantFormat, list[str]] = {}
    for name, fmt in formats.items():
        by_format.setdefault(fmt, []).append(name)
    groups = {}
    for index, (fmt, names) in enumerate(by_format.items()):
        groups[f"group_{index}"] = {
            "targets": ["Linear"] if len(by_format) == 1 else names,
            "weights": {
                "num_bits": fmt.bits,
                "type": "int",
                "symmetric": fmt.symmetric,
                "strategy": "channel" if fmt.group_size is None else "group",
                "group_size": fmt.group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(dense),
        "kv_cache_scheme": None,
    }


def word_aligned_width(K: int, bits: int) -> int:
    """Words per row of the packing that compressed-tensors used before 0.18, see `repack_words`."""
    return -(-K // (32 // bits))


def repack_words(packed: Tensor, bits: int, K: int) -> Tensor:
    """Rows packed by compressed-tensors before 0.18 to the canonical bit stream.

    Widths that do not divide 32 (3 bits here) then held 32 // bits codes per word, the rest of the
    word unused; the other widths' bytes are the same in both.

    Args:
        packed: int32 [N, ceil(K / (32 // bits))].
        bits: of a code.
        K: codes per row.

    Returns:
        int32 [N, ceil(K * bits / 32)].
    """
    shifts = torch.arange(32 // bits, device=packed.device) * bits
    codes = (packed[..., None].long() >> shifts) & ((1 << bits) - 1)
    return pack_codes(codes.to(torch.uint8).flatten(1)[:, :K].contiguous(), bits)
