"""NF4 and FP4: every weight to the nearest entry of a fixed table, scaled per block. No calibration.

Dettmers et al. 2023 (QLoRA), arXiv 2305.14314; codes and scales are bitsandbytes' own, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from llmkern.formats.lut4 import LutFormat
from llmkern.models.linears import dense_weight
from llmkern.nn import Lut4Linear

# Elements per scale that bitsandbytes takes by default.
BLOCK_SIZE = 64


@dataclass(frozen=True)
class TableOptions:
    """NF4 and FP4 have no options beyond the block size, which is `quantize`'s group_size."""


def table_linear(linear: nn.Module, fmt: LutFormat) -> tuple[Lut4Linear, float, float]:
    """The packed layer, its squared error |w - ŵ|², and that as a fraction of |w|².

    Raises:
        ValueError: NaN or Inf in the weight, or blocks that do not fit its rows.
    """
    weight = dense_weight(linear)
    packed = Lut4Linear.from_linear(linear, fmt.codebook, fmt.block_size)
    error = weight.float() - packed.dequantize(torch.float32)
    loss = float(error.square_().sum(dtype=torch.float64))
    total = float(weight.float().square().sum(dtype=torch.float64))
    return packed, loss, loss / total if total else 0.0
