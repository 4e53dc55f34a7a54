"""NF4 and FP4: every weight to the nearest entry of a fixed table, scaled per block. No calibration.

Dettmers et al. 2023 (QLoRA), arXiv 2305.14314; codes and scales are bitsandbytes' own, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmkern.drive import EachLinear, Layer
from llmkern.masks import zero_fraction
from llmkern.nn import Lut4Linear
from llmkern.quantize._formats import TableFormats
from llmkern.quantize._method import QuantizedModule, QuantizeMethod, squared_error


@dataclass(frozen=True)
class TableOptions:
    """NF4 and FP4 have no options beyond the block size, which is `quantize`'s group_size."""


def _layer(layer: Layer, options: TableOptions) -> QuantizedModule:
    packed = Lut4Linear.from_format(layer.module, layer.wanted)
    loss, relative = squared_error(layer.weight, packed.dequantize(torch.float32))
    return QuantizedModule(packed, loss, relative, zeros=zero_fraction(packed.dequantize()))


def _method(table: str, about: str) -> QuantizeMethod:
    return QuantizeMethod(
        name=table,
        about=about,
        options=TableOptions,
        formats=TableFormats(table),
        work=EachLinear(_layer),
        compared={table: {}},
    )


NF4 = _method("nf4", "bitsandbytes' table of normal quantiles")
FP4 = _method("fp4", "bitsandbytes' 4-bit floats")
