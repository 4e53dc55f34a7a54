"""RTN: every weight to the nearest point of its group's grid. No calibration."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, float64, uint8

from llmkern.formats.int4 import QuantFormat
from llmkern.ops import quantize_grid
from llmkern.quantize._report import QuantizedWeight
from llmkern.reference.obs_quantize import quantize_to_grid


@dataclass(frozen=True)
class RtnOptions:
    """Options of `rtn`.

    Attributes:
        clip_search: shrink each group's range to the fraction with the least squared error.
    """

    clip_search: bool = False


def rtn(weight: Tensor, fmt: QuantFormat, options: RtnOptions) -> QuantizedWeight:
    """Round weight [N, K] to nearest on the min-max grid of each group.

    Raises:
        ValueError: the weight is no float matrix or holds NaN or Inf, or the group size does not
            divide K.
    """
    N, K = weight.shape
    group_size = fmt.groups(K)
    scales, zeros = quantize_grid(weight, fmt, clip_search=options.clip_search)
    w = weight.float().reshape(-1, group_size)  # [N * groups, group_size]
    scale, zero = scales.reshape(-1, 1), zeros.reshape(-1, 1)
    codes = quantize_to_grid(w, scale, zero, (1 << fmt.bits) - 1)
    loss = float((scale * (codes - zero) - w).square().sum(dtype=float64))
    total = float(w.square().sum(dtype=float64))
    return QuantizedWeight(
        codes=codes.to(uint8).view(N, K),
        scales=scales.to(weight.dtype),
        zeros=None if fmt.symmetric else zeros.to(uint8),
        loss=loss,
        relative_loss=loss / total if total else 0.0,
        damp=None,
        factored=True,
    )
