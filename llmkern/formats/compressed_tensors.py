"""compressed-tensors' `quantization_config`: how a checkpoint says which module is quantized how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llmkern.formats.int4 import QuantFormat

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
