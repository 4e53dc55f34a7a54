"""What pruning gives back: one weight, one layer's line of the report, the report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class PrunedWeight:
    """One weight as a method leaves it.

    Attributes:
        weight: float [N, K], zero where `mask` is False.
        mask: bool [N, K], True where a weight was kept.
        loss: squared error that the method minimised, over all rows: (w - ŵ) H (w - ŵ)ᵀ where it has
            a Hessian or its diagonal, |w - ŵ|² where it has none.
        relative_loss: the loss as a fraction of w H wᵀ, or of |w|².
        damp: fraction of H's mean diagonal that was added to it; None without a Hessian.
        factored: False if the inputs' statistic could not be used: no input came, or the Hessian could
            not be factored, and a simpler method had to do instead.
    """

    weight: Tensor
    mask: Tensor
    loss: float
    relative_loss: float
    damp: float | None = None
    factored: bool = True


@dataclass(frozen=True)
class PrunedLayer:
    """The line of one layer whose weights were pruned one by one.

    Attributes:
        name: full dotted name.
        shape: (N, K).
        sparsity: fraction of the weight's entries that are zero now.
        pattern: "n:m", or None where only the fraction was asked for.
        loss, relative_loss, damp, factored: see `PrunedWeight`.
        bias_compensated: the bias took up the mean of what was removed.
        seconds: spent on this layer, factorization included where it was the first to need it.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    pattern: str | None
    loss: float
    relative_loss: float
    damp: float | None
    factored: bool
    bias_compensated: bool
    seconds: float


@dataclass(frozen=True)
class WidthReport:
    """The line of one layer that lost neurons or heads.

    Attributes:
        name: full dotted name of the linear that reads them.
        kind: "glu", "mlp" or "attention".
        before, after: neurons or key/value heads.
        loss, relative_loss: squared change of that linear's outputs on the calibration data, and as a
            fraction of their energy; None without calibration data.
        seconds: spent on this layer.
    """

    name: str
    kind: str
    before: int
    after: int
    loss: float | None
    relative_loss: float | None
    seconds: float


@dataclass
class PruneReport:
    """What `prune` did.

    Attributes:
        method: its name.
        amount: what was asked for, such as {"sparsity": 0.5} or {"pattern": "2:4"}.
        options: the method's options, as used.
        tokens: calibration tokens, windows * window; 0 where none were needed.
        window: tokens per calibration window.
        parameters_before, parameters_after: entries of all parameters, tied ones once. Zeros count.
        outliers: fraction of outlying weights in each block, where sparsity was shared out by it.
        layers: one line per pruned layer, in the order of the work.
        kept: why each linear that was not pruned was not, by full name.
        widths: one line per layer that lost neurons or heads, in the order of the work.
        removed_blocks: decoder blocks that are gone, by their old numbers.
        notes: what to know of the result, one sentence each.
        recovery_loss: loss of each step of the training after pruning, in nats per token.
        seconds: in all, calibration included; of a resumed run, also those that led to the last block
            that it found finished.
    """

    method: str
    amount: dict[str, Any]
    options: dict[str, Any]
    tokens: int = 0
    window: int = 0
    parameters_before: int = 0
    parameters_after: int = 0
    outliers: dict[str, float] = field(default_factory=dict)
    layers: list[PrunedLayer] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    widths: list[WidthReport] = field(default_factory=list)
    removed_blocks: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    recovery_loss: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in all pruned layers together; 0.0 where there are none."""
        sizes = [layer.shape[0] * layer.shape[1] for layer in self.layers]
        zeros = sum(s * layer.sparsity for s, layer in zip(sizes, self.layers, strict=True))
        return zeros / sum(sizes) if sizes else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)
