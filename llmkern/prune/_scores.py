"""What a unit is worth, and the loss of removing it.

magnitude   sum over the rows that make the unit of max |w|; for a GLU: max |gate| + max |up|
activation  sqrt(sum over the columns j that read it of E[x_j^2] |w_j|^2): what removing it alone
            changes, nothing else adjusted (Wanda's score, arXiv 2306.11695, of a whole column)
obs         what removing it changes after the other columns have been adjusted, again for each
            unit that is left (Optimal Brain Surgeon on columns: ZipLM, arXiv 2302.04089)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmkern.calibrate import ActivationNormStatistic, HessianStatistic
from llmkern.models import Units
from llmkern.models.linears import bias_of, weight_rows

# Of an input's mean square, the variance that float32 sums cannot tell from zero.
_CONSTANT = 1e-5

IMPORTANCES = ("obs", "activation", "magnitude")


class CentredStatistic(HessianStatistic):
    """Hessian and mean of a layer's inputs.

    A layer with a bias makes up for the mean of what it no longer reads by its bias, so that only the
    inputs' deviations from their mean count.
    """

    def __init__(self, K: int, *, tokens: int, device: torch.device | str = "cpu") -> None:
        super().__init__(K, tokens=tokens, device=device)
        self._norms = ActivationNormStatistic(K, tokens=tokens, device=device)

    def update(self, x: Tensor) -> None:
        super().update(x)
        self._norms.update(x)

    def mean(self) -> Tensor:
        """E[x] of each feature, float32 [K]."""
        return self._norms.mean()

    def moments(self, *, centred: bool) -> Tensor:
        """Symmetric 2/n XᵀX, float32 [K, K]; with `centred`, of X less its mean."""
        H = self.finish()
        H = H.tril() + H.tril(-1).t()
        if not centred:
            return H
        around = H - 2 * torch.outer(self.mean(), self.mean())
        # An input that never changes has only rounding left, of either sign: it counts as none.
        constant = around.diagonal() <= _CONSTANT * H.diagonal()
        around[constant] = 0
        around[:, constant] = 0
        return around


def magnitude(block: nn.Module, units: Units) -> Tensor:
    """Score [units] from the weights alone."""
    score = torch.zeros(len(units))
    for name, rows in units.producers.items():
        largest = weight_rows(block.get_submodule(name)).abs().amax(1).float().cpu()
        score += largest[rows].sum(1)
    return score


def activation(block: nn.Module, units: Units, H: Tensor) -> Tensor:
    """Score [units] from the consumer's weight and the energy of its inputs."""
    weight = weight_rows(block.get_submodule(units.consumer)).float()
    energy = (H.diagonal() * weight.square().sum(0)).cpu()
    return energy[units.columns].sum(1).sqrt()


def output_loss(weight: Tensor, changed: Tensor, H: Tensor) -> tuple[float, float]:
    """(loss, relative loss): (w - ŵ) H (w - ŵ)ᵀ over all rows, and as a fraction of w H wᵀ."""
    error = weight.float() - changed.float()
    loss = float(((error @ H) * error).sum(dtype=torch.float64))
    energy = float(((weight.float() @ H) * weight.float()).sum(dtype=torch.float64))
    return max(loss, 0.0), max(loss, 0.0) / energy if energy > 0 else 0.0


def has_bias(block: nn.Module, units: Units) -> bool:
    """Whether the consumer has a bias that can make up for what it no longer reads."""
    return bias_of(block.get_submodule(units.consumer)) is not None
