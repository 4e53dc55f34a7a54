"""What quantizing gives back: one layer's line of the report, and the report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer's line in the report.

    Attributes:
        name: full dotted name.
        shape: (N, K).
        bits, group_size, symmetric: its format; group_size = K for one scale per row.
        loss, relative_loss, damp, factored: see `Result`.
        zeros: fraction of its weights that are exactly zero, those of a pruned layer among them.
        seconds: spent on this layer, factorization included where it was the first to need it.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    symmetric: bool
    loss: float
    relative_loss: float
    damp: float | None
    factored: bool
    zeros: float
    seconds: float


@dataclass
class QuantizeReport:
    """What `quantize` did.

    Attributes:
        method: its name.
        options: the method's options, as used.
        tokens: calibration tokens, windows * window; 0 for a method that needs none.
        window: tokens per calibration window.
        layers: one line per quantized layer, in the order of the work.
        notes: what to know of the result, one sentence each.
        dense: why each layer inside the blocks that stayed dense did so, by full name.
        seconds: in all, calibration included; of a resumed run, also those that led to the last block
            that it found finished.
    """

    method: str
    options: dict[str, Any]
    tokens: int = 0
    window: int = 0
    layers: list[QuantizedLayer] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)
