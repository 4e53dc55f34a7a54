"""Techniques side by side on one model: each applied to the original, measured in the same way.

What there is to compare is what the methods declare (`Method.compared`), by way of the
stages that call them: a driver or a method that is added there appears here.
"""

from __future__ import annotations

import copy
import gc
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkern import env
from llmkern.assets import calibration_text, evaluation_text
from llmkern.calibrate import load_tokens
from llmkern.calibrate.data import Source, check_text_field, has_fields
from llmkern.evaluate import speeds
from llmkern.hf import accelerate_sparse, load, save
from llmkern.models import evaluation_mode
from llmkern.pipeline._options import nearest
from llmkern.pipeline._peak import PeakMemory
from llmkern.pipeline.measure import beginnings, file_bytes, measure
from llmkern.pipeline.stages import STAGES, Context, Stage
from llmkern.report import PipelineReport, StageRecord
from llmkern.report.view import RATES

# What a method raises for a model, an amount or data that it cannot work with.
_REFUSALS = (ValueError, NotImplementedError, FloatingPointError, torch.OutOfMemoryError)


@dataclass(frozen=True)
class CompareOptions:
    """How methods are compared.

    Attributes:
        methods: labels, methods or kinds of stage ("gptq 4-bit", "gptq", "quantize"); None: all.
        calibration: text, path, tokens or dataset (see `llmkern.calibrate.data`); None takes the text
            that comes with llmkern.
        evaluation: the same, to measure on; None takes the held-out text that comes with llmkern.
        text_field: field of the rows of both that holds their text, where they have rows; None chooses,
            and says which.
        tokenizer: of the model; needed where the data is text.
        seq_len: tokens per window, of calibration and evaluation.
        samples: calibration windows.
        windows: at most so many evaluation windows.
        steps: of training, for methods that train.
        seed: of the choice of windows and of training.
        prompts: to continue in the report; None takes the beginning of the first evaluation window,
            where there is a tokenizer.
        speed: measure tokens per second.
        progress: say on standard error how far it is.
        disk: bytes of the original's safetensors files; None writes it to know them.
        scratch: directory in which models are written to know their size on disk, and removed again;
            None: the system's place for such files.
        name: of the model, for the report.
        command: for the report.
    """

    methods: Sequence[str] | None = None
    calibration: Source = None
    evaluation: Source = None
    text_field: str | None = None
    tokenizer: Any = None
    seq_len: int | None = None
    samples: int = 128
    windows: int = 64
    steps: int = 200
    seed: int = 0
    prompts: Sequence[str] | None = None
    speed: bool = True
    progress: bool = False
    disk: int | None = None
    scratch: Path | None = None
    name: str = "model"
    command: str = "llmkern.pipeline.compare(...)"

    def __post_init__(self) -> None:
        for name in ("samples", "windows", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        check_text_field(self.text_field, self.calibration, self.evaluation)


def compared() -> dict[str, tuple[type[Stage[Any]], Mapping[str, Any]]]:
    """Everything that can be compared: kind of stage and its options, by label."""
    return {
        label: (kind, options)
        for kind in STAGES.values()
        for label, options in kind.compared().items()
    }


def chosen_labels(methods: Sequence[str] | None) -> list[str]:
    """The labels that a choice of labels, methods or kinds of stage means, in their own order.

    Raises:
        ValueError: a name that is none of these; the nearest is named.
    """
    offered = compared()
    if methods is None:
        return list(offered)
    names = {
        label: (label, str(options["method"]), kind.name)
        for label, (kind, options) in offered.items()
    }
    known = dict.fromkeys(name for three in names.values() for name in three)
    for method in methods:
        if method not in known:
            raise ValueError(f"methods: got {method!r}, {nearest(method, list(known))}")
    return [label for label, three in names.items() if any(name in methods for name in three)]


def compare(
    model: Any,
    *,
    said: Callable[[str], None] | None = None,
    **options: Any,
) -> PipelineReport:
    """Apply each method to a copy of `model`, measure it, and forget it.

    Beside the original there is one copy in memory at a time (with a student that is distilled from
    the original, none). 2:4 sparse layers are measured on the sparse kernels.

    Args:
        model: a transformers causal language model; it stays as it is.
        said: called with a line of text after each method.
        options: see `CompareOptions`.

    Returns:
        A report with the original and one row per method; a method that the model, its size or the
        data does not allow stands in `left_out` with its reason.

    Raises:
        ValueError: an unknown method or option out of range, bad data, a model without decoder blocks:
            before anything is done.
        TypeError: an unknown option.
    """
    settings = CompareOptions(**options)
    labels = chosen_labels(settings.methods)
    run = _Comparison(model, settings, said or (lambda text: None))
    for label in labels:
        run.add(label)
    return run.report


class _Comparison:
    """One call of `compare`."""

    def __init__(self, model: Any, settings: CompareOptions, said: Callable[[str], None]) -> None:
        self._model = model
        self._settings = settings
        self._said = said
        tokenizer = settings.tokenizer
        sources = {
            "calibration": calibration_text()
            if settings.calibration is None
            else settings.calibration,
            "evaluation": evaluation_text() if settings.evaluation is None else settings.evaluation,
        }
        self._calibration, held_out = (
            load_tokens(
                source,
                model,
                tokenizer,
                seq_len=settings.seq_len,
                text_field=settings.text_field if has_fields(source) else None,
                argument=name,
                said=said,
            )
            for name, source in sources.items()
        )
        self._windows = held_out[: settings.windows]
        self._reference_logits: dict[bytes, Tensor] = {}
        self.report = PipelineReport(
            title=f"Methods compared on {Path(settings.name).name or settings.name}",
            command=settings.command,
            model=settings.name,
            recipe=[],
            versions=env.versions(),
            hardware=env.hardware(),
            prompts=self._prompts(self._windows[:1], settings.prompts),
            in_sequence=False,
        )
        if settings.evaluation is None:
            self.report.warnings.append(
                "measured on the held-out text that comes with llmkern (Python's standard library): give "
                "a text of the model's own kind for figures that mean something for it"
            )
        disk = self._written_bytes(model) if settings.disk is None else settings.disk
        self.report.stages.append(
            StageRecord(
                name="original",
                stage="original",
                label="original",
                options={},
                seed=None,
                directory=None,
                disk_bytes=disk,
                seconds=0.0,
                peak_memory_bytes=None,
                **self._measured(model, None),
            )
        )

    def add(self, label: str) -> None:
        """Apply one method; a row of the report, or the reason why there is none."""
        try:
            record, notes = self._row(label)
        except Exception as error:  # one method's failure is a row of the table
            reason = " ".join(str(error).split())
            if not isinstance(error, _REFUSALS):
                reason = f"failed: {type(error).__name__}: {reason}"
            self.report.left_out[label] = reason or type(error).__name__
            self._said(f"{label}: not applied: {self.report.left_out[label]}")
            return
        finally:
            gc.collect()
        self.report.stages.append(record)
        self.report.warnings += [f"{label}: {note}" for note in notes]
        found = record.evaluation
        self._said(
            f"{label}: KL {found['kl']:.4f}, perplexity {found['perplexity']:.3f}, "
            f"{record.disk_bytes / 1e6:.2f} MB, {record.seconds:.1f} s"
        )

    def _row(self, label: str) -> tuple[StageRecord, list[str]]:
        stage, settings = self._stage(label), self._settings
        # A student is made from the model without changing it, and takes its place in the context.
        context = Context(
            model=self._model if stage.reads_only else copy.deepcopy(self._model),
            tokenizer=settings.tokenizer,
            calibration=self._calibration,
            original=lambda: self._model,
            load=lambda directory: (load(directory), None),
            progress=settings.progress,
        )
        device = next(self._model.parameters()).device
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always", RuntimeWarning)
            torch.manual_seed(settings.seed)
            start = time.perf_counter()
            with PeakMemory(device) as peak:
                driver = stage.run(context)
            seconds = time.perf_counter() - start
        notes = [*context.notes, *_noted(caught)]
        disk = self._written_bytes(context.model)
        accelerate_sparse(context.model)  # it runs as llmkern runs it
        record = StageRecord(
            name=re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-"),
            stage=stage.name,
            label=label,
            options={"method": stage.method, **stage.options},
            seed=settings.seed,
            directory=None,
            disk_bytes=disk,
            seconds=seconds,
            peak_memory_bytes=peak.bytes or None,
            driver=driver,
            **self._measured(context.model, self._model),
        )
        if settings.speed:
            # Next to each other, because a machine is not as fast at all times.
            with torch.no_grad(), evaluation_mode(self._model):
                rates = speeds(self._model, self._windows[:1])
            record.evaluation["original"] = dict(zip(RATES, rates, strict=True))
        return record, notes

    def _stage(self, label: str) -> Stage[Any]:
        """The stage of a label, with the settings that concern it."""
        kind, preset = compared()[label]
        settings, options = self._settings, dict(preset)
        if "prompts" in options:
            if settings.tokenizer is None:
                raise ValueError(
                    "tokenizer: got None, expected one: prompts are made of the calibration data"
                )
            step = max(1, len(self._calibration) // settings.samples)
            few = self._calibration[::step][: settings.samples]
            options["prompts"] = self._prompts(few, None)
        if "steps" in kind.takes(str(options["method"])):
            # It trains on as many windows as it wants.
            return kind(**{"steps": settings.steps, "seed": settings.seed, **options})
        stage = kind(**options)
        if not stage.needs_calibration:
            return stage
        return kind(**{"samples": settings.samples, "seed": settings.seed, **options})

    def _prompts(self, windows: Tensor, given: Sequence[str] | None) -> list[str]:
        """The prompts that were given, or beginnings of windows."""
        tokenizer = self._settings.tokenizer
        if given is not None or tokenizer is None:
            return list(given or ())
        return beginnings(windows, tokenizer)

    def _measured(self, model: Any, reference: Any) -> dict[str, Any]:
        return measure(
            model,
            self._windows,
            reference,
            tokenizer=self._settings.tokenizer,
            prompts=self.report.prompts,
            speed=self._settings.speed,
            kept=self._reference_logits,
            progress=self._settings.progress,
        )

    def _written_bytes(self, model: Any) -> int:
        """Bytes of the safetensors files that saving the model makes."""
        with tempfile.TemporaryDirectory(dir=self._settings.scratch) as folder:
            save(model, Path(folder) / "model")
            return file_bytes(Path(folder) / "model")


def _noted(caught: list[warnings.WarningMessage]) -> list[str]:
    """The warnings of the drivers, once each; those of others are passed on."""
    notes: dict[str, None] = {}
    for warning in caught:
        if issubclass(warning.category, RuntimeWarning):
            notes[str(warning.message)] = None
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    return list(notes)
