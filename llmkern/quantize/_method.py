"""What a quantization method is, and what it gives back for a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from llmkern.drive import Layer, LayerWork, Method
from llmkern.formats import QuantFormat
from llmkern.nn import IntLinear
from llmkern.quantize._formats import Formats


@dataclass(frozen=True, kw_only=True)
class QuantizeMethod(Method):
    """A way to quantize a model; its functions return a `Result` for each layer.

    Attributes:
        formats: what its layers can be quantized to.
        work: what is done.
    """

    formats: Formats
    work: LayerWork


class Result(Protocol):
    """A layer as a method leaves it.

    Attributes:
        loss: squared error that the method minimised, over all rows.
        relative_loss: as a fraction of the same for a weight of zeros.
        damp: fraction of H's mean diagonal that was added to it; None without a Hessian.
        factored: False if there was a statistic but a simpler method had to do instead.
    """

    @property
    def loss(self) -> float: ...

    @property
    def relative_loss(self) -> float: ...

    @property
    def damp(self) -> float | None: ...

    @property
    def factored(self) -> bool: ...

    def module(self, layer: Layer) -> nn.Module:
        """What takes the layer's place; its own module where that was changed in place."""

    def zero_fraction(self, layer: Layer) -> float:
        """Fraction of its weights that are exactly zero."""


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight as a method leaves it.

    Attributes:
        codes: uint8 [N, K].
        scales: [N, groups], in the dtype of the weight.
        zeros: uint8 [N, groups], or None when symmetric.
        loss: squared error that the method minimised, over all rows: (w - ŵ) H (w - ŵ)ᵀ where it has
            a Hessian, |w - ŵ|² where it has none.
        relative_loss: the loss as a fraction of w H wᵀ, or of |w|².
        damp: fraction of H's mean diagonal that was added to it; None without a Hessian.
        factored: False if there was a Hessian but rounding to nearest had to do instead.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    loss: float
    relative_loss: float
    damp: float | None
    factored: bool

    def module(self, layer: Layer) -> nn.Module:
        """The codes, packed."""
        fmt: QuantFormat = layer.wanted
        packed = IntLinear.from_parts(
            self.codes,
            self.scales,
            self.zeros,
            layer.bias,
            bits=fmt.bits,
            group_size=fmt.group_size,
            dtype=layer.module.get_parameter("weight").dtype,
        )
        return packed.train(layer.module.training)

    def zero_fraction(self, layer: Layer) -> float:
        """Fraction of the codes that stand for zero."""
        fmt: QuantFormat = layer.wanted
        N, K = self.codes.shape
        groups = self.codes.view(N, -1, fmt.groups(K))
        zero = 1 << (fmt.bits - 1) if self.zeros is None else self.zeros[..., None]
        return int((groups == zero).sum()) / max(1, N * K)


@dataclass(frozen=True)
class QuantizedModule:
    """A layer as a method leaves it that makes the module itself.

    Attributes:
        made: the module.
        loss, relative_loss, damp, factored: as of a `QuantizedWeight`.
        zeros: fraction of its weights that are exactly zero.
    """

    made: nn.Module
    loss: float = 0.0
    relative_loss: float = 0.0
    damp: float | None = None
    factored: bool = True
    zeros: float = 0.0

    def module(self, layer: Layer) -> nn.Module:
        """The module."""
        return self.made

    def zero_fraction(self, layer: Layer) -> float:
        """As it was said."""
        return self.zeros


def squared_error(weight: Tensor, after: Tensor) -> tuple[float, float]:
    """|w - ŵ|² over all rows, and as a fraction of |w|².

    Args:
        weight: [N, K].
        after: float32 [N, K]; overwritten.
    """
    loss = float(after.sub_(weight.float()).square_().sum(dtype=torch.float64))
    total = float(weight.float().square().sum(dtype=torch.float64))
    return loss, loss / total if total else 0.0
