"""GPTQ: each column's rounding error is pushed onto the columns still to be rounded.

Frantar et al. 2022, arXiv 2210.17323. The column loop is `llmkern.ops.obs_quantize`; layers that share
an input share one factored Hessian.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmkern.calibrate.statistics import HessianStatistic, relative_loss
from llmkern.drive import EachLinear, Layer
from llmkern.formats.int4 import QuantFormat
from llmkern.ops import obs_quantize
from llmkern.quantize._formats import IntFormats
from llmkern.quantize._method import QuantizedWeight, QuantizeMethod
from llmkern.quantize.rtn import RtnOptions, rtn


@dataclass(frozen=True)
class GptqOptions:
    """Options of `gptq`.

    The defaults are those that left the bundled model's outputs the least changed (KL, several
    calibration seeds): `python bench/quality.py --suite quantize` prints the comparison. One pass per
    block is faster than true_sequential, at a slightly larger KL there, and holds all Hessians of a block
    at once.

    Attributes:
        damp: fraction of the mean of the Hessian's diagonal that is added to it, in [0, 1).
        act_order: round the columns with the largest inputs first; None: wherever group_scales allow.
            Groups stay those of the original order, so every checkpoint format can hold the result.
        group_scales: "static" takes each group's grid from the original weights, "dynamic" from the
            weights as updated when the loop reaches the group; dynamic is not possible with act_order.
        clip_search: shrink each group's range to the fraction with the least squared error.
        true_sequential: inside a block, let each linear see the outputs of the quantized ones before
            it; otherwise all of a block's statistics are taken in one pass, before any is quantized.
        keep_zeros: weights that are exactly zero stay zero, and the others make up for them. None: in
            layers that the model's config records as pruned, or with at least 5 % of exact zeros.
            Rounding to nearest keeps every zero anyway.
    """

    damp: float = 0.01
    act_order: bool | None = None
    group_scales: str = "static"
    clip_search: bool = True
    true_sequential: bool = True
    keep_zeros: bool | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.damp < 1:
            raise ValueError(f"damp: got {self.damp}, expected a fraction in [0, 1)")
        if self.group_scales not in ("static", "dynamic"):
            raise ValueError(
                f"group_scales: got {self.group_scales!r}, expected 'static' or 'dynamic'"
            )
        if self.act_order is None:
            object.__setattr__(self, "act_order", self.group_scales == "static")
        if self.act_order and self.group_scales == "dynamic":
            raise ValueError("group_scales: got 'dynamic' with act_order, expected 'static'")


def gptq(
    weight: Tensor,
    fmt: QuantFormat,
    statistic: HessianStatistic,
    options: GptqOptions,
    mask: Tensor | None = None,
) -> QuantizedWeight:
    """Quantize weight [N, K] against the Hessian of its inputs.

    Args:
        weight: float [N, K].
        fmt: bits, group size, symmetry.
        statistic: of the inputs; shared by all layers that read them.
        options: all but keep_zeros, which `quantize` turns into masks.
        mask: bool [N, K], False where the result has to be exactly zero.

    Returns:
        The weight; its `factored` is False if the Hessian could not be factored at any damping, or no
        input ever came (an expert without tokens): it is then rounded to nearest.

    Raises:
        ValueError: NaN or Inf in the weight or the statistic, or a group size that does not divide K.
    """
    if statistic.rows == 0:
        # An empty Hessian would declare every column dead, and the weight zero.
        plain = rtn(weight, fmt, RtnOptions(options.clip_search))
        return QuantizedWeight(**{**vars(plain), "factored": False})
    factor = statistic.factor(damp=options.damp, act_order=bool(options.act_order))
    result = obs_quantize(
        weight,
        factor,
        fmt,
        group_scales=options.group_scales,
        clip_search=options.clip_search,
        mask=mask,
    )
    return QuantizedWeight(
        codes=result.codes,
        scales=result.scales,
        zeros=result.zeros,
        loss=float(result.loss.sum(dtype=torch.float64)),
        relative_loss=relative_loss(weight, result.loss, factor),
        damp=result.damp,
        factored=result.factored,
    )


def _layer(layer: Layer, options: GptqOptions) -> QuantizedWeight:
    mask = layer.kept(options.keep_zeros)
    return gptq(layer.weight, layer.wanted, layer.statistic, options, mask)


METHOD = QuantizeMethod(
    name="gptq",
    about="each column's rounding error is pushed onto the columns still to be rounded",
    options=GptqOptions,
    formats=IntFormats(),
    work=EachLinear(_layer, HessianStatistic),
    compared={"gptq 4-bit": {"bits": 4}, "gptq 3-bit": {"bits": 3}},
)
