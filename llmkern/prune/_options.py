"""Options that the structured methods share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmkern.prune._scores import IMPORTANCES

RECOVERIES = ("none", "lora", "full")


@dataclass(frozen=True)
class RecoveryOptions:
    """Training after pruning.

    Attributes:
        recovery: training afterwards, on the calibration windows: "none", "lora" (needs peft; merged
            afterwards) or "full" (all weights of the blocks).
        recovery_steps: optimizer steps of that training, one batch each.
        recovery_lr: its peak learning rate; None: 1e-4 for "lora", 1e-5 for "full".
        recovery_rank: rank of LoRA.
    """

    recovery: str = "none"
    recovery_steps: int = 100
    recovery_lr: float | None = None
    recovery_rank: int = 8

    def __post_init__(self) -> None:
        if self.recovery not in RECOVERIES:
            raise ValueError(
                f"recovery: got {self.recovery!r}, expected one of {', '.join(RECOVERIES)}"
            )
        if self.recovery_steps < 1:
            raise ValueError(f"recovery_steps: got {self.recovery_steps}, expected at least 1")
        if self.recovery_rank < 1:
            raise ValueError(f"recovery_rank: got {self.recovery_rank}, expected at least 1")
        if self.recovery_lr is not None and not self.recovery_lr > 0:
            raise ValueError(f"recovery_lr: got {self.recovery_lr}, expected a positive number")


@dataclass(frozen=True)
class SizeOptions(RecoveryOptions):
    """How small the model is to become, where no ratio is given.

    Attributes:
        target_params: parameters that the model may have afterwards, in place of a ratio.
    """

    target_params: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_params is not None and self.target_params < 1:
            raise ValueError(f"target_params: got {self.target_params}, expected at least 1")


def one_of(**amounts: object) -> None:
    """Refuse all but exactly one amount.

    Raises:
        ValueError: none or several are given.
    """
    given = [name for name, value in amounts.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"{', '.join(amounts)}: got {' and '.join(given) or 'none of them'}, expected exactly one"
        )


@dataclass(frozen=True)
class WidthOptions(SizeOptions):
    """Options of the methods that remove neurons or heads.

    Attributes:
        importance: score of a unit: "obs", "activation" or "magnitude" (see `llmkern.prune._scores`).
        compensate: adjust what is left of the matrix that read the removed units, and its bias if it
            has one, so that its outputs change the least.
        damp: fraction of the mean of the Hessian's diagonal that is added to it, in [0, 1).
        round_to: widths of MLPs are multiples of it; None: 256, 128 or 32, the first that is at most
            1/16 of the width (else 32).
        allow_uneven: give each block a width of its own, by a ranking over all blocks. Only llmkern
            can load the result.
        keep_first, keep_last: blocks that an uneven ranking leaves whole; None: one each. The ratio
            stays that of the whole model.
    """

    importance: str = "obs"
    compensate: bool = True
    damp: float = 0.01
    round_to: int | None = None
    allow_uneven: bool = False
    keep_first: int | None = None
    keep_last: int | None = None

    importances: ClassVar[tuple[str, ...]] = IMPORTANCES

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.importance not in self.importances:
            raise ValueError(
                f"importance: got {self.importance!r}, expected one of {', '.join(self.importances)}"
            )
        if not 0 <= self.damp < 1:
            raise ValueError(f"damp: got {self.damp}, expected a fraction in [0, 1)")
        if self.round_to is not None and self.round_to < 1:
            raise ValueError(f"round_to: got {self.round_to}, expected at least 1")
        for name in ("keep_first", "keep_last"):
            value = getattr(self, name)
            if value is not None and not self.allow_uneven:
                raise ValueError(f"{name}: got {value} without allow_uneven, expected nothing")
            if value is not None and value < 0:
                raise ValueError(f"{name}: got {value}, expected at least 0")

    @property
    def calibrated(self) -> bool:
        """Whether the method needs to see calibration data."""
        return self.importance != "magnitude" or self.compensate or self.recovery != "none"
