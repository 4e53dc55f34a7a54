"""What a method is told about a layer's inputs: an object that sees every row of them once."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from llmkern.ops import HessianFactor, factorize_hessian, hessian_update


class Statistic(Protocol):
    """Anything that the walker can feed with the inputs of a group of linears."""

    def update(self, x: Tensor) -> None:
        """Take in x [..., K], the input of one call."""


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
        self._tokens = tokens
        self._factors: dict[tuple[float, bool], HessianFactor] = {}

    def update(self, x: Tensor) -> None:
        """Add 2/n xᵀx of x [..., K]."""
        rows = x.reshape(-1, x.shape[-1])
        hessian_update(self.H, rows, 2.0 / self._tokens)
        self.rows += rows.shape[0]

    def finish(self) -> Tensor:
        """H with n the number of rows that really came, its lower triangle filled.

        Raises:
            ValueError: the inputs held NaN or Inf, or no input ever came.
        """
        if self.rows == 0:
            raise ValueError("no calibration input ever reached it")
        # A NaN or Inf in column k of an input is one in H[k, k], so that no input need be searched.
        if not bool(torch.isfinite(self.H.diagonal()).all()):
            raise ValueError("its calibration activations hold NaN or Inf, expected finite numbers")
        if self.rows != self._tokens:
            self.H.mul_(self._tokens / self.rows)
            self._tokens = self.rows
        return self.H

    def factor(self, *, damp: float, act_order: bool) -> HessianFactor:
        """`factorize_hessian` of `finish()`, done once per setting and shared by all that ask."""
        key = (damp, act_order)
        if key not in self._factors:
            self._factors = {key: factorize_hessian(self.finish(), damp=damp, act_order=act_order)}
        return self._factors[key]
