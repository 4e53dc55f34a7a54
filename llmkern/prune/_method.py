"""What a pruning method is; and one call of `prune`, as its method sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkern._dtypes import dtype_name
from llmkern.calibrate import load_windows
from llmkern.calibrate.data import Source, teller
from llmkern.drive import DataOptions, Findings, Journal, Method, MethodWork, Shapes, open_journal
from llmkern.models import compute_dtype, compute_note
from llmkern.prune._amount import Amount
from llmkern.prune._report import PruneReport


@dataclass
class PruneJob:
    """What to do, and the report to fill.

    Attributes:
        model: changed in place.
        options: of the method, an instance of its dataclass.
        data: how calibration data is cut and fed.
        amount: the sparsity, pattern or ratio asked for; None where the method does without.
        rules: glob over layer names -> an amount of their own, or None to leave them as they are.
        report: `layers`, `kept` and whatever else the method has to say.
        progress: show a progress bar.
        calibration, tokenizer: as given; see `windows`.
        data_given: names of the options of `data` that the caller gave.
        checkpoint, resume: as given.
        dry: the model has no data: only plans are made.
        journal: what keeps the finished blocks, once `open_journal` has been called; None: nothing does.
    """

    model: nn.Module
    options: Any
    data: DataOptions
    amount: Amount | None
    rules: Mapping[str, Any]
    report: PruneReport
    progress: bool = False
    calibration: Source = None
    tokenizer: Any = None
    data_given: tuple[str, ...] = ()
    checkpoint: str | Path | None = None
    resume: bool = False
    dry: bool = False
    journal: Journal | None = field(default=None, repr=False)
    _windows: Tensor | None = field(default=None, repr=False)

    def windows(self) -> Tensor:
        """The calibration windows, int64 [n, seq_len]; the report then says that they were used."""
        if self._windows is None:
            self._windows = load_windows(
                self.calibration,
                self.model,
                self.tokenizer,
                seq_len=self.data.seq_len,
                samples=self.data.samples,
                seed=self.data.seed,
                text_field=self.data.text_field,
                said=teller(self.report.notes, shown=self.progress),
            )
            self.report.tokens = self._windows.numel()
            self.report.window = self._windows.shape[1]
            note = compute_note(self.model, self._compute_dtype())
            self.report.notes += [] if note is None else [note]
        return self._windows

    def _compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.model, self.data.compute_dtype)

    def open_journal(self, *, calibrated: bool) -> None:
        """Open the journal that was asked for; before the model is changed.

        Args:
            calibrated: the method reads the calibration windows.

        Raises:
            ValueError: see `llmkern.drive.open_journal`.
        """
        asked = {
            "driver": "prune",
            "method": self.report.method,
            "amount": self.report.amount,
            "options": asdict(self.options),
            "rules": {glob: None if v is None else str(v) for glob, v in self.rules.items()},
            "batch_size": self.data.batch_size if calibrated else None,
            "seed": self.data.seed if calibrated else None,
            "compute_dtype": dtype_name(self._compute_dtype()) if calibrated else None,
        }
        self.journal = open_journal(
            self.model,
            asked,
            self.windows() if calibrated else None,
            checkpoint=self.checkpoint,
            resume=self.resume,
        )

    def refuse_calibration(self, why: str) -> None:
        """For a method that needs no data: refuse data, instead of ignoring it.

        Args:
            why: it needs none, to be appended to the message.

        Raises:
            ValueError: there is calibration data or an option of it.
        """
        if self.calibration is not None:
            raise ValueError(f"calibration: got data, expected none: {why}")
        for name in self.data_given:
            raise ValueError(
                f"{name}: got {getattr(self.data, name)}, expected no data options: {why}"
            )


class PruneWork(MethodWork):
    """What a pruning method does to a model."""

    def run(self, job: PruneJob) -> None:
        """Check everything, then change `job.model` and fill `job.report`."""
        raise NotImplementedError

    def after(self, job: PruneJob, shapes: Shapes, found: Findings) -> Shapes:
        """What it leaves of a model without data.

        Args:
            job: dry, on `shapes.model`.
            shapes: dense, before it.
            found: filled with warnings and notes; what will be refused is raised.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PruneMethod(Method):
    """A way to prune a model.

    Attributes:
        amounts: which of sparsity, pattern and ratio it takes; one of them must be given, unless
            `needs_amount` says otherwise.
        work: what is done.
        needs_amount: an amount must be given; False where options can say it in another way.
        undecided: options whose default depends on whether there is data, and what they are in a recipe
            that does not say.
    """

    amounts: tuple[str, ...]
    work: PruneWork
    needs_amount: bool = True
    undecided: Mapping[str, Any] = field(default_factory=dict)
