"""RTN: every weight to the nearest point of its group's grid. No calibration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmkern.drive import EachLinear, Layer
from llmkern.formats.int4 import QuantFormat
from llmkern.ops import round_to_nearest
from llmkern.quantize._formats import IntFormats
from llmkern.quantize._method import QuantizedWeight, QuantizeMethod


@dataclass(frozen=True)
class RtnOptions:
    """Options of `rtn`.

    Attributes:
        clip_search: shrink each group's range to the fraction with the least squared error. Off by
            default: plain RTN is what others compare with, and what `patch` does.
    """

    clip_search: bool = False


def rtn(weight: Tensor, fmt: QuantFormat, options: RtnOptions) -> QuantizedWeight:
    """Round weight [N, K] to nearest on the min-max grid of each group.

    Raises:
        ValueError: the weight is no float matrix or holds NaN or Inf, or the group size does not
            divide K.
    """
    result = round_to_nearest(weight, fmt, clip_search=options.clip_search)
    loss = float(result.loss.sum(dtype=torch.float64))
    total = float(weight.float().square().sum(dtype=torch.float64))
    return QuantizedWeight(
        codes=result.codes,
        scales=result.scales,
        zeros=result.zeros,
        loss=loss,
        relative_loss=loss / total if total else 0.0,
        damp=None,
        factored=True,
    )


def _layer(layer: Layer, options: RtnOptions) -> QuantizedWeight:
    return rtn(layer.weight, layer.wanted, options)


METHOD = QuantizeMethod(
    name="rtn",
    about="every weight to the nearest point of its group's grid",
    options=RtnOptions,
    formats=IntFormats(),
    work=EachLinear(_layer),
    compared={"rtn 4-bit": {"bits": 4}, "rtn 3-bit": {"bits": 3}},
)
