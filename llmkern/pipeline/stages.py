"""The stages of a pipeline: which driver each calls, with which options, and what it needs.

A stage is made with its options and refuses wrong ones at once; `run` hands them to the driver. A new
kind of stage is a class here and an entry of `STAGES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkern._drive import DataOptions, sort_options
from llmkern.distill import COMPARED as DISTILL_COMPARED
from llmkern.distill import METHODS as DISTILL_METHODS
from llmkern.distill import distill, make_student
from llmkern.formats.int4 import QuantFormat
from llmkern.formats.lut4 import LutFormat
from llmkern.pipeline._options import check_names, class_options, driver_options, plain
from llmkern.pipeline._stage import GIVEN, SOURCE, STATE, Context, Stage
from llmkern.prune import COMPARED as PRUNE_COMPARED
from llmkern.prune import METHODS as PRUNE_METHODS
from llmkern.prune import Pattern, prune
from llmkern.prune._amount import check_fraction, parse_pattern
from llmkern.prune._driver import sort_amount
from llmkern.quantize import COMPARED as QUANTIZE_COMPARED
from llmkern.quantize import METHODS as QUANTIZE_METHODS
from llmkern.quantize import quantize
from llmkern.quantize._driver import choose_format
from llmkern.quantize.tables import TableOptions
from llmkern.train import TrainOptions

CURRENT, ORIGINAL = "current", "original"
# Checkpoints of a training, where a recipe does not say how often.
_CHECKPOINTS = 20


class Prune(Stage):
    """`llmkern.prune` as a stage: `Prune("glu", ratio=0.25)`.

    Magnitude pruning lets biases take up the mean of what is removed only where `bias_compensation` is
    asked for, because that needs data.
    """

    name = "prune"
    methods = PRUNE_METHODS
    compared = PRUNE_COMPARED
    default = "sparsegpt"

    def _known(self, method: str) -> dict[str, Any]:
        own = class_options(PRUNE_METHODS[method].options) | class_options(DataOptions)
        amounts = ("sparsity", "pattern", "ratio")
        without = (*GIVEN, *STATE, *(a for a in amounts if a not in PRUNE_METHODS[method].amounts))
        known = driver_options(prune, without) | own | {"calibration": SOURCE}
        if "sparsity" not in PRUNE_METHODS[method].amounts:
            del known["rules"]
        return known

    def _plainer(self, name: str, value: Any) -> Any:
        if name == "pattern" and value is not None:
            return str(parse_pattern(value))
        if name == "rules" and isinstance(value, Mapping):
            return {k: str(v) if isinstance(v, Pattern) else v for k, v in value.items()}
        return value

    def _check(self) -> None:
        kind = PRUNE_METHODS[self.method]
        kinds = {name: method.options for name, method in PRUNE_METHODS.items()}
        plain_options = {k: v for k, v in self.options.items() if k not in self._outside()}
        settings, _ = sort_options(self.method, kinds, plain_options)
        sort_amount(self.method, kind, {name: self.options.get(name) for name in kind.amounts})
        if not kind.needs_amount:
            amounts = [
                n for n in ("ratio", "target_params", "blocks") if n in self._known(self.method)
            ]
            given = [name for name in amounts if self.options.get(name) is not None]
            if len(given) != 1:
                got = " and ".join(given) or "none of them"
                raise ValueError(f"{', '.join(amounts)}: got {got}, expected exactly one")
        for glob, value in (self.options.get("rules") or {}).items():
            if isinstance(value, int | float):
                check_fraction(value, f"rules[{glob!r}]")
            elif value is not None:
                parse_pattern(value, f"rules[{glob!r}]")
        if not self.needs_calibration:
            self._refuse_data_options()
        if getattr(settings, "allocation", None) == "owl" and self.options.get("sparsity") is None:
            raise ValueError("allocation: got 'owl' with a pattern, expected a sparsity to spread")

    def _outside(self) -> tuple[str, ...]:
        """Options that `prune` does not leave to the method."""
        return ("sparsity", "pattern", "ratio", "rules", "calibration")

    @property
    def needs_calibration(self) -> bool:
        plain_options = {k: v for k, v in self.options.items() if k not in self._outside()}
        kinds = {name: method.options for name, method in PRUNE_METHODS.items()}
        settings, _ = sort_options(self.method, kinds, plain_options)
        if self.method == "magnitude":
            return settings.allocation == "owl" or bool(settings.bias_compensation)
        return bool(getattr(settings, "calibrated", True))

    @property
    def label(self) -> str:
        amount = ""
        for name in ("sparsity", "ratio"):
            if self.options.get(name) is not None:
                amount = f" {self.options[name] * 100:g} %"
        if self.options.get("pattern") is not None:
            amount = f" {self.options['pattern']}"
        if self.options.get("blocks") is not None:
            amount = f" {self.options['blocks']} blocks"
        if self.options.get("target_params") is not None:
            amount = f" to {self.options['target_params'] / 1e6:.4g} M parameters"
        return f"prune {self.method}{amount}"

    def run(self, context: Context) -> dict[str, Any]:
        context.expand_packed("to be pruned")
        options = {k: v for k, v in self.options.items() if k != "calibration"}
        if self.method == "magnitude":
            options.setdefault("bias_compensation", False)
        if self.needs_calibration:
            options |= {"calibration": self._source(context), "tokenizer": context.tokenizer}
        options |= {"progress": context.progress, **context.state()}
        return prune(context.model, self.method, **options).to_dict()


class Quantize(Stage):
    """`llmkern.quantize` as a stage: `Quantize("gptq", bits=4, group_size=128)`.

    In `rules` each layer's format is a mapping with bits, group_size and symmetric (with the tables:
    block_size), or null to leave it dense.
    """

    name = "quantize"
    methods = QUANTIZE_METHODS
    compared = QUANTIZE_COMPARED
    default = "gptq"

    def _known(self, method: str) -> dict[str, Any]:
        own = class_options(QUANTIZE_METHODS[method]) | class_options(DataOptions)
        return driver_options(quantize, (*GIVEN, *STATE)) | own | {"calibration": SOURCE}

    def _plainer(self, name: str, value: Any) -> Any:
        if name == "rules" and isinstance(value, Mapping):
            return {glob: _described(fmt) for glob, fmt in value.items()}
        return value

    def _check(self) -> None:
        outside = ("bits", "group_size", "symmetric", "rules", "calibration")
        options = {k: v for k, v in self.options.items() if k not in outside}
        sort_options(self.method, QUANTIZE_METHODS, options)
        self._formats()
        if not self.needs_calibration:
            self._refuse_data_options()

    def _formats(self) -> dict[str, QuantFormat | LutFormat | None]:
        """The rules as `quantize` takes them; all formats are checked on the way.

        Raises:
            ValueError: one that there is not.
        """
        common = {k: v for k, v in self.options.items() if k in ("bits", "group_size", "symmetric")}
        formats: dict[str, QuantFormat | LutFormat | None] = {}
        table = QUANTIZE_METHODS[self.method] is TableOptions
        sizes = ("block_size",) if table else ("bits", "group_size", "symmetric")
        for glob, rule in {"*": {}, **(self.options.get("rules") or {})}.items():
            if rule is not None and not isinstance(rule, Mapping):
                raise ValueError(
                    f"rules[{glob!r}]: got {rule!r}, expected a mapping with {', '.join(sizes)}, or null"
                )
            try:
                check_names(rule or (), sizes)
                wanted = dict(rule or {})
                if "block_size" in wanted:
                    wanted["group_size"] = wanted.pop("block_size")
                whole = {"bits": 4, "group_size": "auto", "symmetric": True, **common, **wanted}
                formats[glob] = None if rule is None else choose_format(self.method, **whole)
            except (ValueError, NotImplementedError) as error:
                if glob == "*" and rule == {}:
                    raise ValueError(str(error)) from error
                raise ValueError(f"rules[{glob!r}]: {error}") from error
        if "*" not in (self.options.get("rules") or {}):
            del formats["*"]
        return formats

    @property
    def needs_calibration(self) -> bool:
        return self.method == "gptq"

    @property
    def label(self) -> str:
        if QUANTIZE_METHODS[self.method] is TableOptions:
            return f"quantize {self.method}"
        return f"quantize {self.method} {self.options.get('bits', 4)} bits"

    def run(self, context: Context) -> dict[str, Any]:
        context.expand_packed("to be quantized anew")
        options = {k: v for k, v in self.options.items() if k not in ("calibration", "rules")}
        if self.needs_calibration:
            options |= {"calibration": self._source(context), "tokenizer": context.tokenizer}
        options |= {"progress": context.progress, **context.state()}
        report = quantize(context.model, self.method, rules=self._formats(), **options)
        return report.to_dict()


def _described(fmt: Any) -> Any:
    """A format of a rule as a recipe writes it."""
    if isinstance(fmt, QuantFormat):
        return {"bits": fmt.bits, "group_size": fmt.group_size, "symmetric": fmt.symmetric}
    if isinstance(fmt, LutFormat):
        return {"block_size": fmt.block_size}
    return fmt


class Distill(Stage):
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
    methods = DISTILL_METHODS
    compared = DISTILL_COMPARED
    default = "soft"

    def _known(self, method: str) -> dict[str, Any]:
        training = class_options(TrainOptions, STATE)
        own = {"student": str | Mapping[str, Any], "teacher": str, "data": SOURCE}
        known = driver_options(distill, (*GIVEN, *STATE)) | class_options(DISTILL_METHODS[method])
        known |= training | own
        if "answers" in known:
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

    def _settings(self) -> Any:
        """The method's options; those of the training are checked, too."""
        outside = (*driver_options(distill, ()), "student", "teacher")
        options = {k: v for k, v in self.options.items() if k not in outside}
        # Without a checkpoint, how often one is written would be refused.
        options["checkpoint"] = "."
        return sort_options(self.method, DISTILL_METHODS, options, TrainOptions)[0]

    def _check(self) -> None:
        self._settings()
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
        settings = self._settings()
        if hasattr(settings, "answers"):
            return False
        # On-policy methods may mix windows in, whatever their prompts come from.
        mixed = getattr(settings, "on_policy", 1) < 1 or getattr(settings, "lm_weight", 0) > 0
        return mixed or getattr(settings, "prompts", None) is None

    @property
    def _narrows(self) -> bool:
        return isinstance(self.student, dict) and self.student.get("width", 1.0) < 1

    @property
    def needs_calibration(self) -> bool:
        return self._reads_windows or self._narrows

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
        options = {k: v for k, v in self.options.items() if k not in ("student", "teacher", "data")}
        if self._reads_windows:
            options["data"] = self._source(context)
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
        if "answers" in self._known(self.method) and self.options.get("prompts") is not None:
            places["answers"] = context.checkpoint / "answers.jsonl"
        return {name: value for name, value in places.items() if name not in self.options}

    def _make(self, context: Context) -> tuple[Any, Any]:
        """The student and its tokenizer."""
        if self.student == CURRENT:
            context.expand_packed("to be trained")
            return context.model, context.tokenizer
        if isinstance(self.student, str):
            student, tokenizer = context.load(self.student)
            return student, tokenizer or context.tokenizer
        narrow: dict[str, Any] = {}
        if self._narrows:
            narrow = {"width": self.student["width"], "seed": self.seed}
            narrow |= {"calibration": self._source(context), "tokenizer": context.tokenizer}
        return make_student(
            context.model, self.student.get("layers", 1.0), **narrow
        ), context.tokenizer


STAGES: dict[str, type[Stage]] = {kind.name: kind for kind in (Prune, Quantize, Distill)}
