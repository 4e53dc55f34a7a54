"""Lion: the sign of a momentum, one state tensor per parameter (Chen et al. 2023, arXiv 2302.06675)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    """w -= lr (sign(beta1 m + (1 - beta1) g) + weight_decay w); m = beta2 m + (1 - beta2) g.

    Every weight moves by lr in each step, so lr is 3 to 10 times smaller than AdamW's and weight_decay
    as much larger.

    Args:
        params: parameters, or dicts of parameter groups.
        lr: positive.
        betas: beta1 and beta2 in [0, 1).
        weight_decay: at least 0, decoupled.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        if not lr > 0:
            raise ValueError(f"lr: got {lr}, expected a positive number")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: got {betas}, expected two numbers in [0, 1)")
        if weight_decay < 0:
            raise ValueError(f"weight_decay: got {weight_decay}, expected at least 0")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; returns the closure's loss if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["exp_avg"] = torch.zeros_like(weight)
                average, gradient = state["exp_avg"], weight.grad
                move = torch.lerp(gradient, average, beta1).sign_()
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(move, alpha=-group["lr"])
                average.lerp_(gradient, 1 - beta2)
        return loss
