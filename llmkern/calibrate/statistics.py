"""What a method is told about a layer's inputs: an object that sees every row of them once."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from llmkern._dtypes import overflow_hint
from llmkern.ops import HessianFactor, factorize_hessian, hessian_update

# Rows whose output energy is computed for a relative loss; all N would cost as much as the column loop.
_ENERGY_ROWS = 256

_NO_INPUT = "no calibration input ever reached it"
_NOT_FINITE = "its calibration activations hold NaN or Inf, expected finite numbers"
_TOO_LARGE = (
    "its calibration activations reach {:.3g}, expected at most about 1e18: squares pass float32"
)


class Statistic(Protocol):
    """Anything that the walker can feed with the inputs of a group of linears."""

    def update(self, x: Tensor) -> None:
        """Take in x [..., K], the input of one call."""


class InputStatistic(Statistic, Protocol):
    """What methods ask of a layer's inputs by its class, so that its memory is known before.

    Attributes:
        rows: input rows seen so far.
    """

    rows: int

    def __init__(self, K: int, *, tokens: int, device: torch.device | str = "cpu") -> None:
        """Start from zero.

        Args:
            K: width of the inputs.
            tokens: rows that are expected in all; a layer may see fewer, as experts do.
            device: where the inputs will be.
        """

    @classmethod
    def nbytes(cls, K: int) -> int:
        """Bytes that its use takes at the peak, for a layer with K in features."""

    @classmethod
    def nbytes_held(cls, K: int) -> int:
        """Bytes that it takes while it waits for its layer's turn."""


class HessianStatistic:
    """The Hessian 2/n XᵀX of a layer's squared output error, float32 [K, K], lower triangle.

    Linears with the same input share one. Its memory is 4 K² bytes; `factor` needs the same twice
    more and keeps one of them until the object is dropped.

    Attributes:
        H: float32 [K, K].
        rows: input rows seen so far.
    """

    def __init__(self, K: int, *, tokens: int, device: torch.device | str = "cpu") -> None:
        """Start from zero.

        Args:
            K: width of the inputs.
            tokens: rows that are expected in all; `hessian` corrects for a layer that saw fewer, as
                experts do.
            device: where the inputs will be.
        """
        self.H = torch.zeros(K, K, dtype=torch.float32, device=device)
        self.rows = 0
        self._largest = torch.zeros((), dtype=torch.float32, device=device)
        self._dtype = torch.float32
        self._tokens = tokens
        self._factors: dict[tuple[float, bool, int], HessianFactor] = {}

    @classmethod
    def nbytes(cls, K: int) -> int:
        """Of the Hessian, its factor and the factorization's own matrix."""
        return 3 * K * K * 4

    @classmethod
    def nbytes_held(cls, K: int) -> int:
        """Of the Hessian."""
        return K * K * 4

    def update(self, x: Tensor) -> None:
        """Add 2/n xᵀx of x [..., K]."""
        rows = x.reshape(-1, x.shape[-1])
        hessian_update(self.H, rows, 2.0 / self._tokens)
        self.rows += rows.shape[0]
        self._dtype = x.dtype
        if rows.numel():
            # Whether a sum that is not finite comes of inputs that are.
            low, high = torch.aminmax(rows)
            self._largest = torch.maximum(self._largest, torch.maximum(-low, high).float())

    def finish(self) -> Tensor:
        """H with n the number of rows that really came, its lower triangle filled.

        Raises:
            ValueError: the inputs held NaN or Inf, or numbers whose squares pass float32's range, or no
                input ever came.
        """
        if self.rows == 0:
            raise ValueError(_NO_INPUT)
        # A NaN or Inf in column k of an input is one in H[k, k], so that no input need be searched.
        if not bool(torch.isfinite(self.H.diagonal()).all()):
            largest = float(self._largest)
            if math.isfinite(largest):
                raise ValueError(_TOO_LARGE.format(largest))
            raise ValueError(_NOT_FINITE + overflow_hint(self._dtype))
        if self.rows != self._tokens:
            self.H.mul_(self._tokens / self.rows)
            self._tokens = self.rows
        return self.H

    def factor(self, *, damp: float, act_order: bool, unit: int = 1) -> HessianFactor:
        """`factorize_hessian` of `finish()`, done once per setting and shared by all that ask."""
        key = (damp, act_order, unit if act_order else 1)
        if key not in self._factors:
            factor = factorize_hessian(self.finish(), damp=damp, act_order=act_order, unit=unit)
            self._factors = {key: factor}
        return self._factors[key]


def relative_loss(weight: Tensor, loss: Tensor, factor: HessianFactor) -> float:
    """A layer's loss over w H wᵀ, estimated on evenly spaced rows; H damped, as in the loss.

    Args:
        weight: float [N, K], before it was changed.
        loss: float [N], each row's (w - ŵ) H (w - ŵ)ᵀ.
        factor: of H.
    """
    N = weight.shape[0]
    rows = torch.arange(0, N, -(-N // _ENERGY_ROWS), device=weight.device)
    w = weight[rows].float()
    if factor.order is not None:
        w = w[:, factor.order]
    energy = float((w @ factor.U).mul_(factor.d).square().sum(dtype=torch.float64))
    return float(loss[rows].sum(dtype=torch.float64)) / energy if energy else 0.0


class ActivationNormStatistic:
    """Norm and mean of each feature of a layer's inputs, over all rows that came.

    Sums are taken in float32 within a call and in float64 between calls, whatever the inputs' dtype:
    squares of float16 activations pass its range; where they pass float32's, too, all is in float64.

    Attributes:
        rows: input rows seen so far.
    """

    def __init__(self, K: int, *, tokens: int, device: torch.device | str = "cpu") -> None:
        """Start from zero.

        Args:
            K: width of the inputs.
            tokens: rows that are expected in all; a layer may see fewer, as experts do.
            device: where the inputs will be.
        """
        self.rows = 0
        self._dtype = torch.float32
        self.tokens = tokens
        self._squares = torch.zeros(K, dtype=torch.float64, device=device)
        self._sums = torch.zeros(K, dtype=torch.float64, device=device)

    @classmethod
    def nbytes(cls, K: int) -> int:
        """Of the two sums."""
        return 2 * K * 8

    @classmethod
    def nbytes_held(cls, K: int) -> int:
        """Of the same."""
        return cls.nbytes(K)

    def update(self, x: Tensor) -> None:
        """Add the rows of x [..., K]."""
        rows = x.reshape(-1, x.shape[-1]).float()
        squares = rows.square().sum(0)
        if not bool(torch.isfinite(squares).all()):
            rows = rows.double()
            squares = rows.square().sum(0)
        self._squares += squares
        self._sums += rows.sum(0)
        self.rows += rows.shape[0]
        self._dtype = x.dtype

    def mean_square(self) -> Tensor:
        """E[x²] of each feature, float32 [K]: half the diagonal of the Hessian.

        In float64 where one passes float32's range.

        Raises:
            ValueError: the inputs held NaN or Inf, or no input ever came.
        """
        return self._finish(self._squares)

    def mean(self) -> Tensor:
        """E[x] of each feature, float32 [K].

        Raises:
            ValueError: the inputs held NaN or Inf, or no input ever came.
        """
        return self._finish(self._sums)

    def _finish(self, total: Tensor) -> Tensor:
        if self.rows == 0:
            raise ValueError(_NO_INPUT)
        # A NaN or Inf in a feature is one in the sum of its squares.
        if not bool(torch.isfinite(self._squares).all()):
            raise ValueError(_NOT_FINITE + overflow_hint(self._dtype))
        mean = total / self.rows
        narrow = mean.float()
        return narrow if bool(torch.isfinite(narrow).all()) else mean
