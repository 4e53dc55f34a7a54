"""Options of the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from llmkern._files import check_writable

PRECISIONS = ("no", "bf16", "fp16")
OPTIMIZERS = ("adamw", "lion")


@dataclass(frozen=True)
class TrainOptions:
    """How a model is trained.

    Attributes:
        steps: updates of the weights.
        lr: learning rate after the warm-up, falling along a cosine to 0.
        batch_size: windows per forward and process.
        accumulate: forwards per step, whose gradients add up.
        warmup: fraction of the steps over which lr rises from 0.
        weight_decay: decoupled; matrices only.
        optimizer: "adamw" or "lion".
        clip: largest norm of the gradient; None for no limit.
        mixed_precision: "no", "bf16" or "fp16": what forwards run in; weights stay float32.
        seed: of the order of the windows and of dropout.
        checkpoint: directory that gets the state of training; None keeps none.
        checkpoint_every: steps between checkpoints; 0: only at the end.
        resume: go on from `checkpoint` if it holds one.
        log_dir: directory for TensorBoard; None writes no log.
    """

    steps: int = 500
    lr: float = 1e-3
    batch_size: int = 8
    accumulate: int = 1
    warmup: float = 0.05
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    clip: float | None = 1.0
    mixed_precision: str = "no"
    seed: int = 0
    checkpoint: str | Path | None = None
    checkpoint_every: int = 0
    resume: bool = False
    log_dir: str | Path | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if not self.lr > 0:
            raise ValueError(f"lr: got {self.lr}, expected a positive number")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: got {self.warmup}, expected a fraction in [0, 1)")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay: got {self.weight_decay}, expected at least 0")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip: got {self.clip}, expected a positive number or None")
        if self.checkpoint_every < 0:
            raise ValueError(f"checkpoint_every: got {self.checkpoint_every}, expected at least 0")
        for name, known in (("optimizer", OPTIMIZERS), ("mixed_precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {known}")
        if self.checkpoint is None and (self.checkpoint_every or self.resume):
            raise ValueError(
                "checkpoint: got None with checkpoint_every or resume, expected a path"
            )

    def check_places(self) -> None:
        """Refuse places where the training could not write; nothing is changed.

        Raises:
            OSError: nothing can be written there.
            ValueError: the log needs a package that is not installed.
        """
        for name in ("checkpoint", "log_dir"):
            place = getattr(self, name)
            if place is not None:
                check_writable(Path(place) / "new", name)
        if self.log_dir is not None and find_spec("tensorboard") is None:
            raise ValueError(
                f"log_dir: got {str(self.log_dir)!r}, expected the package tensorboard to be installed"
            )
