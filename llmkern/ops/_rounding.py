"""Rounding to nearest, in the terms of obs_quantize: the same loop without a Hessian."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.formats.int4 import QuantFormat
from llmkern.ops.obs_quantize import ObsResult, quantize_grid
from llmkern.reference.obs_quantize import quantize_to_grid


def round_to_nearest(
    w: Tensor,
    fmt: QuantFormat,
    *,
    clip_search: bool = False,
    scale_dtype: torch.dtype | None = None,
) -> ObsResult:
    """Round w [N, K] on the min-max grid of each group. Arguments are those of `quantize_grid`.

    Returns:
        An `ObsResult` whose Hessian is the identity: `loss` is each row's |w - w_hat|², damp 0.

    Raises:
        ValueError: w is no float matrix or holds NaN or Inf; the group size does not divide K.
    """
    scale_dtype = scale_dtype or w.dtype
    scales, zeros = quantize_grid(w, fmt, clip_search=clip_search, scale_dtype=scale_dtype)
    groups = w.float().reshape(*scales.shape, -1)  # [N, groups, group_size]
    scale, zero = scales[..., None], zeros[..., None]
    codes = quantize_to_grid(groups, scale, zero, (1 << fmt.bits) - 1)
    w_hat = (scale * (codes - zero)).view(w.shape)
    return ObsResult(
        codes=codes.to(torch.uint8).view(w.shape),
        scales=scales.to(scale_dtype),
        zeros=None if fmt.symmetric else zeros.to(torch.uint8),
        w_hat=w_hat,
        loss=(w_hat - w.float()).square().sum(1),
        damp=0.0,
        factored=True,
    )
