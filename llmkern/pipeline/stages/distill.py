"""`llmkern.distill` as a stage of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkern.distill import METHODS, DistillMethod, distill, make_student
from llmkern.distill._method import training_journal, training_nbytes
from llmkern.distill._plan import DistillJob
from llmkern.distill._student import chosen_blocks
from llmkern.drive import Findings, Shapes, Tokens, fresh
from llmkern.hf import load_tokenizer
from llmkern.models import find_blocks, keep_blocks
from llmkern.pipeline._options import check_names, class_options, driver_options, plain
from llmkern.pipeline._shapes import read_shapes
from llmkern.pipeline.stages._stage import GIVEN, SOURCE, STATE, Context, Stage
from llmkern.pipeline.stages.prune import Prune
from llmkern.train import TrainOptions

CURRENT, ORIGINAL = "current", "original"
# Checkpoints of a training, where a recipe does not say how often.
_CHECKPOINTS = 20


class Distill(Stage[DistillMethod]):
    """`llmkern.distill` as a stage: `Distill("soft", student={"layers": 0.5}, steps=500)`.

    Options beside those of `llmkern.distill` and its training:
        student: {"layers": fraction, number or list of blocks, "width": fraction of the neurons that
            stay}, made by `make_student` from the model as the stages before left it; the directory of
            another model; or "current", that model itself. {"layers": 0.5} by default.
        teacher: "current", the model as the stages before left it, or "original", the one that the
            run began with; by default current, and for the student "current" the original.
        data: text or tokens to train on (and to choose neurons by); the run's calibration by default.
    """

    name = "distill"
    methods = METHODS
    default = "soft"
    common = TrainOptions
    usual_samples = 4096
    repeats = False

    @classmethod
    def _known(cls, method: DistillMethod) -> dict[str, Any]:
        training = class_options(TrainOptions, STATE)
        own = {"student": str | Mapping[str, Any], "teacher": str, "data": SOURCE}
        known = driver_options(distill, (*GIVEN, *STATE)) | class_options(method.options)
        known |= training | own
        if method.answers:
            del known["samples"]  # it trains on answers, not on windows
        return known

    def _plainer(self, name: str, value: Any) -> Any:
        if name == "student" and isinstance(value, Mapping):
            kinds = {"layers": float | int | list[int], "width": float}
            try:
                check_names(value, kinds)
                return {key: plain(key, item, kinds[key]) for key, item in value.items()}
            except ValueError as error:
                raise ValueError(f"student.{error}") from error
        return value

    def settings(self) -> tuple[Any, TrainOptions]:
        """The method's options and those of the training."""
        # Without a checkpoint, how often one is written would be refused; the pipeline gives one.
        return self._sorted({**self.options, "checkpoint": "."})

    def _check(self) -> None:
        self.settings()
        self._check_student()
        if self.options.get("teacher", CURRENT) not in (CURRENT, ORIGINAL):
            raise ValueError(
                f"teacher: got {self.options['teacher']!r}, expected {CURRENT!r} or {ORIGINAL!r}"
            )
        if self.student == CURRENT and self.teacher == CURRENT:
            raise ValueError(
                f"teacher: got {CURRENT!r} for the student {CURRENT!r}, expected {ORIGINAL!r}: a model "
                "learns nothing from itself"
            )

    def _check_student(self) -> None:
        student = self.student
        if isinstance(student, str):
            if student != CURRENT and not Path(student).is_dir():
                raise ValueError(
                    f"student: got {student!r}, expected a model directory, {CURRENT!r}, or a mapping "
                    "with layers, width"
                )
            return
        if not student:
            raise ValueError("student: got an empty mapping, expected layers, width or both")
        layers, width = student.get("layers", 1.0), student.get("width", 1.0)
        fraction = isinstance(layers, float)
        if not isinstance(layers, list) and (layers <= 0 or (fraction and layers > 1)):
            raise ValueError(
                f"student.layers: got {layers}, expected a fraction in (0, 1], a number of blocks or a "
                "list of them"
            )
        if isinstance(layers, list) and (not layers or layers != sorted(set(layers))):
            raise ValueError(f"student.layers: got {layers}, expected rising numbers of blocks")
        if not 0 < width <= 1:
            raise ValueError(f"student.width: got {width}, expected a fraction in (0, 1]")

    @property
    def student(self) -> str | dict[str, Any]:
        """What is trained, as in a recipe."""
        student: str | dict[str, Any] = self.options.get("student", {"layers": 0.5})
        return student

    @property
    def teacher(self) -> str:
        """Which model it learns from."""
        default = ORIGINAL if self.student == CURRENT else CURRENT
        return str(self.options.get("teacher", default))

    @property
    def _reads_windows(self) -> bool:
        """Whether it trains on windows of text, not on answers or only from prompts."""
        return self.kind.reads_windows(self.settings()[0])

    @property
    def _narrows(self) -> bool:
        return isinstance(self.student, dict) and self.student.get("width", 1.0) < 1

    @property
    def needs_calibration(self) -> bool:
        return self._reads_windows or self._narrows

    @property
    def walks(self) -> bool:
        return self._narrows

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("answers",) if self.options.get("prompts") is not None else ()

    @property
    def own_data(self) -> Any:
        return self.options.get("data")

    @property
    def label(self) -> str:
        student = self.student
        if isinstance(student, str):
            return f"distill {self.method} into {CURRENT if student == CURRENT else Path(student).name}"
        layers, width = student.get("layers"), student.get("width")
        parts = []
        if isinstance(layers, float):
            parts.append(f"{layers * 100:g} % of blocks")
        elif layers is not None:
            count = layers if isinstance(layers, int) else len(layers)
            parts.append(f"{count} block{'s' if count > 1 else ''}")
        if width is not None:
            parts.append(f"{width * 100:g} % of neurons")
        return f"distill {self.method} into {', '.join(parts)}"

    def run(self, context: Context) -> dict[str, Any]:
        teacher = context.model if self.teacher == CURRENT else context.original()
        teacher_tokenizer = context.tokenizer
        student, tokenizer = self._make(context)
        # A teacher whose place the student takes must not be held by the context, too.
        context.model, context.tokenizer = student, tokenizer
        apart = ("student", "teacher", "data", "text_field")
        options = {k: v for k, v in self.options.items() if k not in apart}
        if self._reads_windows:
            field = self.text_field(context.text_field)
            options |= {"data": self._source(context), "text_field": field}
        report = distill(
            student,
            teacher,
            self.method,
            tokenizer=tokenizer,
            teacher_tokenizer=teacher_tokenizer,
            progress=context.progress,
            **self._places(context),
            **options,
        )
        return report.to_dict()

    def _places(self, context: Context) -> dict[str, Any]:
        """Where the state of the training is kept, and how often, unless the recipe says so."""
        if context.checkpoint is None:
            return {}
        steps = self.options.get("steps", TrainOptions.steps)
        places = {**context.state(), "checkpoint_every": max(1, steps // _CHECKPOINTS)}
        if self.kind.answers and self.options.get("prompts") is not None:
            places["answers"] = context.checkpoint / "answers.jsonl"
        return {name: value for name, value in places.items() if name not in self.options}

    def _make(self, context: Context) -> tuple[Any, Any]:
        """The student and its tokenizer."""
        if self.student == CURRENT:
            context.expand_packed("to be trained")
            return context.model, context.tokenizer
        if isinstance(self.student, str):
            student, tokenizer = context.load(self.student)
            context.source = Path(self.student)
            return student, tokenizer or context.tokenizer
        narrow: dict[str, Any] = {}
        if self._narrows:
            narrow = {"width": self.student["width"], "seed": self.seed}
            narrow |= self._calibration(context)
        return make_student(
            context.model, self.student.get("layers", 1.0), **narrow
        ), context.tokenizer

    @property
    def reads_only(self) -> bool:
        return isinstance(self.student, dict)

    @property
    def keeps_packed(self) -> bool:
        return self.student != CURRENT

    def plan(self, before: Shapes, original: Shapes, found: Findings) -> Shapes:
        teacher = original if self.teacher == ORIGINAL else before
        if self.student == CURRENT:
            made = before.dense()
        elif isinstance(self.student, str):
            made = read_shapes(self.student)
            if made.packed:
                found.errors.append(
                    f"student: got {self.student}, which holds packed layers, expected dense weights to "
                    "train"
                )
        else:
            made = before.dense()
            kept = chosen_blocks(self.student.get("layers", 1.0), len(find_blocks(made.model)))
            made.model = fresh(made.model)
            keep_blocks(made.model, kept)
            width = self.student.get("width", 1.0)
            if width < 1:
                made = Prune("mlp", ratio=1 - width).plan(made, original, found)
        if not self.kind.answers:
            tokenizer = None
            if isinstance(self.student, str) and self.student != CURRENT:
                tokenizer = load_tokenizer(self.student)
            DistillJob(
                made.model, teacher.model, tokenizer, None, None, None, 1, TrainOptions(), False
            ).check_tokens()
        made.stored = None
        return made

    def memory(self, before: Shapes, after: Shapes, original: Shapes, tokens: Tokens) -> int:
        teacher = before if self.teacher == CURRENT else original
        return training_nbytes(self.settings()[1], teacher, after, tokens)

    def journal(self, after: Shapes, tokens: Tokens) -> int:
        return training_journal(self.settings()[1], after)
