"""Run a pipeline: stages in a row, each from the directory of the one before into one of its own.

What a stage gets is always what the stage before has written, read again: so a run that was killed and
resumed does the same work on the same bits as one that was not, and what is measured is what was saved.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkern import env
from llmkern._dtypes import dtype_name
from llmkern._progress import note
from llmkern.assets import evaluation_text
from llmkern.calibrate import load_tokens
from llmkern.evaluate import weight_bytes
from llmkern.hf import accelerate_sparse, load, load_tokenizer, save
from llmkern.hf.save import write_generation, write_tokenizer
from llmkern.models import context_length, vocabulary_size
from llmkern.models.vocabulary import shared_vocabulary
from llmkern.pipeline import _fingerprint
from llmkern.pipeline._directory import RunDirectory
from llmkern.pipeline._order import order_warnings
from llmkern.pipeline._origin import Origin
from llmkern.pipeline._peak import PeakMemory
from llmkern.pipeline._shapes import read_shapes
from llmkern.pipeline.measure import beginnings, file_bytes, measure
from llmkern.pipeline.preflight import Preflight, check
from llmkern.pipeline.recipe import dump_recipe
from llmkern.pipeline.run_options import RunOptions
from llmkern.pipeline.sensitivity import sensitivity
from llmkern.pipeline.stages import Context, Stage, fit_to_later, source_of
from llmkern.report import PipelineReport, StageRecord, write_report

ORIGINAL = "original"
# Windows on which each block's change is measured alone.
_SENSITIVITY_WINDOWS = 8
_PROMPTS = 3


class Pipeline:
    """Stages to be run one after the other."""

    def __init__(self, stages: Sequence[Stage[Any]]) -> None:
        """Keep the stages.

        Args:
            stages: `Prune`, `Quantize`, `Distill`, any of them in any order.

        Raises:
            ValueError: no stage, or something else among them.
        """
        odd = next((stage for stage in stages if not isinstance(stage, Stage)), None)
        if odd is not None or not stages:
            got = "none" if odd is None else type(odd).__name__
            raise ValueError(f"stages: got {got}, expected stages such as Prune('glu', ratio=0.25)")
        self.stages = fit_to_later(stages)

    def __repr__(self) -> str:
        return f"Pipeline({self.stages!r})"

    def run(
        self,
        model: Any,
        output: str | Path = "llmkern-out",
        *,
        resume: bool = False,
        overwrite: bool = False,
        **options: Any,
    ) -> PipelineReport:
        """Compress a model and measure it before, between and after the stages.

        Args:
            model: a directory, or a transformers causal language model, which stays as it is.
            output: directory to be made: the compressed model with the report; below it the model
                after each stage.
            resume: go on with the run that `output` holds, if there is one: finished stages are read,
                the unfinished one continues where its driver's state allows. The result has the same
                bits as that of a run that was not interrupted.
            overwrite: delete the run or model that `output` holds.
            options: see `RunOptions`.

        Returns:
            The report, which is also written (report.html, report.md, report.json).

        Raises:
            ValueError: what the preflight calls impossible (all of it), data to evaluate on that cannot
                be read, resume with a changed recipe, model, data or setting (shown): all before any
                work; what a stage's driver refuses.
            FileExistsError: `output` holds a run, a model or other files.
            FloatingPointError: a loss became NaN. The stages before it stay, and so does the last
                checkpoint of the training.

        Warns:
            UserWarning: an order of stages that costs quality; what the preflight warns of.
        """
        settings = RunOptions(**options)
        where = RunDirectory(Path(output))
        where.check(resume=resume, overwrite=overwrite)
        run = _Run(
            self.stages,
            Origin.of(model, settings.tokenizer, settings.dtype, settings.device),
            where,
            settings,
        )
        found = run.check(output, going_on=resume and where.is_run())
        about = {"versions": env.versions(), "hardware": env.hardware()}
        before = where.begin(run.settings(), dump_recipe(self.stages), about, resume=resume)
        if before is not None:
            run.say(f"going on with the run in {where.root}")
        with _quiet_transformers():
            return run.work(self, about, before or about, [str(w) for w in found.warnings])

    def preflight(self, model: Any, output: str | Path, **options: Any) -> Preflight:
        """What `run` with the same arguments would need, and refuse, found without any work.

        Raises:
            ValueError: an option that there is not.
        """
        settings = RunOptions(**options)
        return _preflight(
            self.stages,
            Origin.of(model, settings.tokenizer, settings.dtype, settings.device),
            settings,
            Path(output),
        )


def _preflight(
    stages: Sequence[Stage[Any]], origin: Origin, options: RunOptions, output: Path | None
) -> Preflight:
    return check(
        origin.model if origin.directory is None else origin.directory,
        stages,
        calibration=options.calibration,
        text_field=options.field_of(source_of(options.calibration)),
        tokenizer=origin.tokenizer,
        output=output,
        dtype=origin.dtype,
        device=origin.device,
    )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers, which shows one for every file it reads or writes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@dataclass
class _Run:
    """One call of `Pipeline.run`."""

    stages: list[Stage[Any]]
    origin: Origin
    where: RunDirectory
    options: RunOptions
    prompts: list[str] = field(default_factory=list)
    _read: dict[Any, Tensor] = field(default_factory=dict)
    _reference_logits: dict[bytes, Tensor] = field(default_factory=dict)

    def say(self, text: str) -> None:
        """Tell the user, if asked to."""
        if self.options.progress:
            note(text)

    def check(self, output: str | Path, *, going_on: bool) -> Preflight:
        """Refuse what cannot work, before anything is written.

        Args:
            output: as given.
            going_on: a run goes on, so that part of what it needs of the disk is already there.

        Raises:
            ValueError: see `Pipeline.run`.
        """
        source = self.origin.directory
        if source is not None and source.resolve().is_relative_to(self.where.root.resolve()):
            raise ValueError(
                f"output: got {output}, expected a directory that does not hold the model"
            )
        options = self.options
        with tempfile.TemporaryDirectory() as folder:  # before any work: what cannot be saved
            write_tokenizer(self.origin.tokenizer, Path(folder))
            if self.origin.model is not None:
                write_generation(self.origin.model, Path(folder))
        found = _preflight(self.stages, self.origin, options, None if going_on else self.where.root)
        if options.on_preflight is not None:
            options.on_preflight(found)
        found.refuse()
        # A model without data tells all that reading the evaluation text takes.
        skeleton = read_shapes(source or self.origin.model, self.origin.dtype).model
        self._windows(skeleton, self.origin.tokenizer)
        self.prompts = self._prompts(skeleton)
        return found

    def settings(self) -> dict[str, Any]:
        """All that the result depends on."""
        options = self.options
        dtype = options.dtype
        return {
            "recipe": {
                f"{index}-{stage.name}": {"method": stage.method, **stage.options}
                for index, stage in enumerate(self.stages, 1)
            },
            "model": self.origin.fingerprint(),
            "calibration": _fingerprint.of_source(source_of(options.calibration)),
            "evaluation": _fingerprint.of_source(source_of(options.evaluation)),
            "evaluation_windows": options.evaluation_windows,
            "text_field": options.text_field,
            "prompts": None if options.prompts is None else list(options.prompts),
            "files": _fingerprint.of_options(self.stages),
            "dtype": None if dtype is None else dtype_name(dtype),
            "device": self.origin.device.type,
        }

    def work(
        self,
        pipeline: Pipeline,
        about: dict[str, Any],
        before: dict[str, Any],
        found: Sequence[str],
    ) -> PipelineReport:
        """Do what is not done yet, publish the last stage and write the report.

        Args:
            pipeline: for the report.
            about: versions and hardware, of this process.
            before: those of the process that began the run.
            found: warnings of the preflight.
        """
        options, labels = self.options, [stage.label for stage in self.stages]
        report = PipelineReport(
            title=" → ".join(labels),
            command=options.command or f"{pipeline!r}.run({self.origin.name!r}, ...)",
            model=self.origin.name,
            recipe=[stage.to_dict() for stage in self.stages],
            **about,
            warnings=[*order_warnings(self.stages), *found, *_changes(before, about)],
        )
        for text in report.warnings:
            warnings.warn(text, UserWarning, stacklevel=3)
        report.stages.append(self._original(about))
        report.prompts = self.prompts
        for index, stage in enumerate(self.stages, 1):
            record, notes = self._finished(index, stage, about)
            report.stages.append(record)
            report.warnings += [f"stage {index}: {note}" for note in notes]
        self.where.publish(report.stages[-1].name)
        try:
            write_report(report, self.where.root)
        except Exception as error:  # the models are there, and each has its record
            warnings.warn(
                f"report: not all of it was written ({type(error).__name__}: {error}); the models in "
                f"{self.where.root} are whole",
                stacklevel=3,
            )
        return report

    def _original(self, about: dict[str, Any]) -> StageRecord:
        done = self.where.record(ORIGINAL)
        if done is not None:
            return done[0]
        model = self.origin.open()
        self.say("measuring the original")
        record = StageRecord(
            name=ORIGINAL,
            stage=ORIGINAL,
            label=ORIGINAL,
            options={},
            seed=None,
            directory=None,
            disk_bytes=self._original_bytes(model),
            seconds=0.0,
            peak_memory_bytes=None,
            **self._measured(model, self.origin.tokenizer, None),
        )
        self.where.write_original(record, about)
        return record

    def _finished(
        self, index: int, stage: Stage[Any], about: dict[str, Any]
    ) -> tuple[StageRecord, list[str]]:
        """A stage's record and notes, after doing it if that has not been done."""
        name = f"{index}-{stage.name}"
        done = self.where.record(name)
        if done is not None:
            return done
        self.say(f"stage {index} of {len(self.stages)}: {stage.label}")
        with PeakMemory(self.origin.device) as peak:
            context, driver, seconds = self._drive(index, stage)
        for said in driver.get("notes", ()):
            self.say(f"stage {index} of {len(self.stages)}: {said}")
        with self.where.writing(name) as partial:
            self.say(f"stage {index} of {len(self.stages)}: saving and measuring")
            save(context.model, partial, context.tokenizer, source=context.source)
            tokenizer, context.model = context.tokenizer, None
            after = self._open(partial)
            record = StageRecord(
                name=name,
                stage=stage.name,
                label=stage.label,
                options={"method": stage.method, **stage.options},
                seed=stage.seed,
                directory=f"stages/{name}",
                disk_bytes=file_bytes(partial),
                # The drivers count what a killed run had spent on what it had finished.
                seconds=max(seconds, float(driver.get("seconds", 0.0))),
                peak_memory_bytes=peak.bytes or None,
                driver=driver,
                sensitivity=self._sensitivity(index, after),
                **self._measured(after, tokenizer, self.origin.open()),
            )
            self.where.write_record(partial, record, context.notes, about)
        return record, context.notes

    def _drive(self, index: int, stage: Stage[Any]) -> tuple[Context, dict[str, Any], float]:
        """Let a stage work on what the one before has left."""
        model, tokenizer = self._input(index)
        context = Context(
            model=model,
            tokenizer=tokenizer,
            calibration=source_of(self.options.calibration),
            text_field=self.options.field_of(source_of(self.options.calibration)),
            original=self.origin.open,
            load=lambda directory: (self._open(Path(directory)), load_tokenizer(Path(directory))),
            checkpoint=self.where.state(f"{index}-{stage.name}"),
            source=self._source(index),
            progress=self.options.progress,
        )
        del model
        on_gpu = self.origin.device.type == "cuda"
        with torch.random.fork_rng([self.origin.device] if on_gpu else []):
            torch.manual_seed(stage.seed)
            start = time.perf_counter()
            driver = stage.run(context)
        return context, driver, time.perf_counter() - start

    def _input(self, index: int) -> tuple[Any, Any]:
        """Model and tokenizer that stage `index` begins with, its to change."""
        before = self._source(index)
        if index == 1 or before is None:
            return self.origin.copy(), self.origin.tokenizer
        return self._open(before), load_tokenizer(before)

    def _source(self, index: int) -> Path | None:
        """The directory of the model that stage `index` begins with; None for one in memory."""
        if index == 1:
            return self.origin.directory
        return self.where.stage(f"{index - 1}-{self.stages[index - 2].name}")

    def _open(self, directory: Path) -> Any:
        return load(directory, dtype="auto").to(self.origin.device)  # type: ignore[arg-type]

    def _windows(self, model: Any, tokenizer: Any) -> Tensor:
        """Evaluation windows; a source is read once for all models with the same tokens."""
        words = None if tokenizer is None else frozenset(tokenizer.get_vocab().items())
        key = vocabulary_size(model), context_length(model), words
        if key not in self._read:
            source = source_of(self.options.evaluation)
            source = evaluation_text() if source is None else source
            windows = load_tokens(
                source,
                model,
                tokenizer,
                samples=self.options.evaluation_windows,
                text_field=self.options.field_of(source),
                argument="evaluation",
                said=self.say,
            )
            self._read[key] = windows[: self.options.evaluation_windows].clone()
        return self._read[key]

    def _prompts(self, model: Any) -> list[str]:
        """The prompts that were given, or beginnings of evaluation windows."""
        tokenizer = self.origin.tokenizer
        if self.options.prompts is not None:
            return list(self.options.prompts)
        if tokenizer is None:
            return []
        windows = self._windows(model, tokenizer)
        rows = windows[:: max(1, len(windows) // _PROMPTS)][:_PROMPTS]
        return beginnings(rows, tokenizer)

    def _original_bytes(self, model: Any) -> int:
        directory = self.origin.directory
        return weight_bytes(model) if directory is None else file_bytes(directory)

    def _measured(self, model: Any, tokenizer: Any, reference: Any) -> dict[str, Any]:
        windows = self._windows(model, tokenizer)
        if reference is not None and not self._comparable(model, tokenizer, reference):
            reference = None  # a student with another tokenizer
        if model is not self.origin.model:
            accelerate_sparse(model)  # it runs as llmkern runs it
        return measure(
            model,
            windows,
            reference,
            tokenizer=tokenizer,
            reference_tokenizer=self.origin.tokenizer,
            prompts=self.prompts if tokenizer is not None else (),
            speed=self.options.speed,
            kept=self._reference_logits,
            progress=self.options.progress,
        )

    def _comparable(self, model: Any, tokenizer: Any, reference: Any) -> bool:
        """Whether the logits of a model are about the same tokens as the original's."""
        sizes = vocabulary_size(reference), vocabulary_size(model)
        try:
            shared_vocabulary(sizes, (self.origin.tokenizer, tokenizer), ("reference", "model"))
        except ValueError:
            return False
        return True

    def _sensitivity(self, index: int, after: Any) -> dict[str, float]:
        if not self.options.sensitivity:
            return {}
        before, tokenizer = (
            (self.origin.open(), self.origin.tokenizer) if index == 1 else self._input(index)
        )
        if vocabulary_size(before) != vocabulary_size(after):
            return {}
        windows = self._windows(before, tokenizer)[:_SENSITIVITY_WINDOWS]
        return sensitivity(before, after, windows, progress=self.options.progress)


def _changes(before: dict[str, Any], about: dict[str, Any]) -> list[str]:
    """What is not as it was when the run began, so that it may have other bits."""
    found = []
    for kind, now in about.items():
        for name, value in now.items():
            if before[kind].get(name) != value:
                was = before[kind].get(name)
                found.append(f"the run was resumed with other {kind}: {name} was {was}, is {value}")
    return found
