"""What every stage of a pipeline is: a method with options, checked at once, and a driver to run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from llmkern.calibrate.data import Source
from llmkern.drive import (
    DataOptions,
    Findings,
    Method,
    MethodWork,
    Shapes,
    Tokens,
    find_method,
    sort_options,
)
from llmkern.patch import expand_packed
from llmkern.pipeline._options import check_names, class_options, nearest, plain

# What the pipeline itself gives to a driver.
GIVEN = ("model", "calibration", "tokenizer", "teacher_tokenizer", "progress")
STATE = ("checkpoint", "resume")
# The text that comes with llmkern, where one wants it: a stage with no data is refused.
BUILTIN = "builtin"
# Annotation of a stage's own source.
SOURCE = str | list[str] | None


_M = TypeVar("_M", bound=Method)


@dataclass
class Context:
    """What a stage works on.

    Attributes:
        model: as the stages before left it; a stage changes it or puts another in its place.
        tokenizer: of that model, or None.
        calibration: source of the run, for stages without one of their own.
        text_field: of that source's rows.
        original: returns the model that the run began with, which no stage may change.
        load: returns the model of a directory, and its tokenizer or None.
        checkpoint: directory for the state of unfinished work, and perhaps with some from before.
        source: directory that the model is from, for the files that go with it; None: no one knows.
        progress: show progress bars.
        notes: what a stage had to do that nobody asked for.
    """

    model: Any
    tokenizer: Any
    calibration: Source
    original: Callable[[], Any]
    load: Callable[[str], tuple[Any, Any]]
    checkpoint: Path | None = None
    source: Path | None = None
    progress: bool = False
    notes: list[str] = field(default_factory=list)
    text_field: str | None = None

    def state(self) -> dict[str, Any]:
        """Options of a driver that goes on where it was, if it was."""
        return {"checkpoint": self.checkpoint, "resume": self.checkpoint is not None}

    def expand_packed(self, why: str) -> None:
        """Make packed layers of the model dense, and note that it was done."""
        expanded = expand_packed(self.model)
        if expanded:
            self.notes.append(f"{len(expanded)} packed layers were expanded to dense ones {why}")


class Stage(Generic[_M]):
    """One step of a pipeline: a method and its options.

    Attributes:
        name: of the kind of stage, its key in a recipe.
        methods: its driver's list of methods.
        default: its method if none is given.
        common: dataclass of the options that all of its methods share.
        usual_samples: windows of the data, where the options do not say.
        repeats: windows are drawn again where the data has fewer.
        method: the name of one of `methods`, which is `kind`.
        options: the options that were given, checked, in the types of YAML and JSON.
    """

    name: ClassVar[str]
    methods: ClassVar[Sequence[Any]]
    default: ClassVar[str]
    common: ClassVar[Any] = DataOptions
    usual_samples: ClassVar[int] = DataOptions.samples
    repeats: ClassVar[bool] = True
    method: str
    kind: _M
    options: dict[str, Any]

    def __init__(self, method: str | None = None, /, **options: Any) -> None:
        """Check the options.

        Args:
            method: one of `methods`.
            options: of the driver and the method, and `calibration`: a source of the stage's own (path
                or name of a dataset; "builtin" is the text that comes with llmkern).

        Raises:
            ValueError: an unknown method or option (the nearest is named), a value of the wrong type or
                out of range, a missing amount.
        """
        method = options.pop("method", self.default if method is None else method)
        names = [known.name for known in self.methods]
        if method not in names:
            raise ValueError(f"method: got {method!r}, {nearest(str(method), names)}")
        kind = find_method(self.methods, method)
        object.__setattr__(self, "kind", kind)
        known_options = self._known(kind)
        check_names(options, known_options)
        checked = {
            name: plain(name, self._plainer(name, value), known_options[name])
            for name, value in options.items()
        }
        object.__setattr__(self, "method", method)
        object.__setattr__(self, "options", checked)
        self._check()

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name}: a stage cannot be changed, make another")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stage) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"{type(self).__name__}({self.method!r}{options})"

    def to_dict(self) -> dict[str, Any]:
        """The entry of a recipe: {name: {"method": ..., options}}."""
        return {self.name: {"method": self.method, **self.options}}

    @property
    def label(self) -> str:
        """For people: "prune glu 25 %"."""
        raise NotImplementedError

    @property
    def seed(self) -> int:
        """Of all that the stage draws at random."""
        return int(self.options.get("seed", 0))

    @property
    def needs_calibration(self) -> bool:
        """Whether the stage cannot do without text or tokens."""
        raise NotImplementedError

    @property
    def walks(self) -> bool:
        """Whether it goes through the blocks one after the other, with data."""
        return self.needs_calibration

    @property
    def own_data(self) -> Any:
        """The stage's own source of text or tokens, None where it takes the run's."""
        return self.options.get("calibration")

    @property
    def outputs(self) -> tuple[str, ...]:
        """Options that name a file which the stage writes, not one that it reads."""
        return ()

    def run(self, context: Context) -> dict[str, Any]:
        """Do it to `context.model`; the driver's report, ready for JSON."""
        raise NotImplementedError

    def settings(self) -> tuple[Any, Any]:
        """The options of the method and those that all methods share, as their dataclasses."""
        return self._sorted(self.options)

    def _sorted(self, options: Mapping[str, Any]) -> tuple[Any, Any]:
        classes = (self.kind.options, self.common)
        fields = {field.name for kind in classes for field in dataclasses.fields(kind)}
        own = {name: value for name, value in options.items() if name in fields}
        return sort_options(self.kind, own, self.common)

    @property
    def reads_only(self) -> bool:
        """Whether the model stays as it is and another takes its place."""
        return False

    @property
    def keeps_packed(self) -> bool:
        """Whether packed layers of the model may stay packed."""
        return False

    @property
    def holds_multiples_of(self) -> tuple[int, ...]:
        """What widths should be multiples of for this stage to hold them, the best first."""
        return ()

    def fitted_to(self, multiples: tuple[int, ...]) -> Stage[_M]:
        """The stage, with what later ones say of `holds_multiples_of`."""
        return self

    def plan(self, before: Shapes, original: Shapes, found: Findings) -> Shapes:
        """The shapes that the stage leaves.

        Args:
            before: the model that it gets.
            original: the model that the pipeline began with.
            found: filled.

        Raises:
            ValueError, NotImplementedError: what its driver will refuse.
        """
        raise NotImplementedError

    def memory(self, before: Shapes, after: Shapes, original: Shapes, tokens: Tokens) -> int:
        """Bytes at the peak of the work.

        Args:
            before, after: the model that it gets and leaves.
            original: the model that the pipeline began with.
            tokens: of the stage's data.
        """
        settings, data = self.settings()
        work: MethodWork = self.kind.work  # type: ignore[attr-defined]
        dense = Shapes(before.model)
        held, extra = dense.weights(), work.nbytes(settings, dense, tokens)
        if not self.needs_calibration:
            return held + extra
        hidden = tokens.hidden(dense)
        passing = tokens.activations(dense, data.batch_size) + tokens.cast(dense)
        # While a block is kept, its bytes and the hidden states' are there twice.
        kept = hidden + dense.largest_block()
        peak = held + hidden + max(extra + passing, kept)
        return max(peak, work.nbytes_after(settings, after, data.batch_size, tokens))

    def journal(self, after: Shapes, tokens: Tokens) -> int:
        """Bytes that the state of the unfinished stage takes on disk, old and new."""
        work: MethodWork = self.kind.work  # type: ignore[attr-defined]
        return work.nbytes_journal(self.settings()[0], after, tokens)

    @classmethod
    def compared(cls) -> dict[str, dict[str, Any]]:
        """What a comparison shows of the methods: options of a stage, its method among them, by label."""
        return {
            label: {"method": method.name, **options}
            for method in cls.methods
            for label, options in method.compared.items()
        }

    @classmethod
    def takes(cls, method: str) -> frozenset[str]:
        """Names of the options of a method."""
        return frozenset(cls._known(find_method(cls.methods, method)))

    @classmethod
    def _known(cls, method: _M) -> dict[str, Any]:
        """Annotation of each option of a method."""
        raise NotImplementedError

    def _plainer(self, name: str, value: Any) -> Any:
        """An option's value, given as an object of ours, in the types that a recipe has."""
        return value

    def _check(self) -> None:
        """Refuse options that do not fit each other.

        Raises:
            ValueError: names the option.
        """
        raise NotImplementedError

    def _refuse_data_options(self) -> None:
        for name in ("calibration", *class_options(DataOptions)):
            if name in self.options:
                raise ValueError(
                    f"{name}: got {self.options[name]!r}, expected nothing: {self.name} "
                    f"{self.method} reads no calibration data here"
                )

    def _source(self, context: Context) -> Source:
        return context.calibration if self.own_data is None else source_of(self.own_data)

    def text_field(self, of_run: str | None) -> str | None:
        """The field of its data's rows, where `of_run` is that of the run's own source."""
        own: str | None = self.options.get("text_field")
        return of_run if own is None and self.own_data is None else own

    def _calibration(self, context: Context) -> dict[str, Any]:
        """What a driver gets to calibrate with."""
        return {
            "calibration": self._source(context),
            "text_field": self.text_field(context.text_field),
            "tokenizer": context.tokenizer,
        }


def fit_to_later(stages: Sequence[Stage[Any]]) -> list[Stage[Any]]:
    """The stages, each told which widths those after it can hold best."""
    fitted: list[Stage[Any]] = []
    later: tuple[int, ...] = ()
    for stage in reversed(stages):
        fitted.append(stage.fitted_to(later))
        later = stage.holds_multiples_of or later
    return fitted[::-1]


def source_of(value: Any) -> Source:
    """A source as `llmkern.calibrate` takes it: "builtin" is the text that comes with llmkern."""
    return None if isinstance(value, str) and value == BUILTIN else value
