"""`llmkern.quantize` as a stage of a pipeline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmkern.drive import Findings, Shapes
from llmkern.formats import FORMATS, WeightFormat
from llmkern.pipeline._options import check_names, class_options, driver_options
from llmkern.pipeline.stages._stage import GIVEN, SOURCE, STATE, Context, Stage
from llmkern.quantize import METHODS, QuantizeMethod, quantize
from llmkern.quantize._driver import check_formats, plan_formats, size_notes

# Groups that "auto" takes where larger ones do not fit.
_SMALLER = (64, 32)
_COMMON = {"bits": 4, "group_size": "auto", "symmetric": True}


class Quantize(Stage[QuantizeMethod]):
    """`llmkern.quantize` as a stage: `Quantize("gptq", bits=4, group_size=128)`.

    In `rules` each layer's format is a mapping with bits, group_size and symmetric (with the tables:
    block_size), or null to leave it dense.
    """

    name = "quantize"
    methods = METHODS
    default = "gptq"

    @classmethod
    def _known(cls, method: QuantizeMethod) -> dict[str, Any]:
        own = class_options(method.options) | class_options(cls.common)
        return driver_options(quantize, (*GIVEN, *STATE)) | own | {"calibration": SOURCE}

    def _plainer(self, name: str, value: Any) -> Any:
        if name == "rules" and isinstance(value, Mapping):
            return {glob: self._described(fmt) for glob, fmt in value.items()}
        return value

    def _described(self, fmt: Any) -> Any:
        """A format of a rule as a recipe writes it: the method knows the rest."""
        if type(fmt) not in FORMATS:
            return fmt
        keys = self.kind.formats.rule
        return {k: v for k, v in fmt.to_dict().items() if k in keys}

    def _check(self) -> None:
        self.settings()
        self._formats()
        if not self.needs_calibration:
            self._refuse_data_options()

    def _formats(self) -> dict[str, WeightFormat | None]:
        """The rules as `quantize` takes them; all formats are checked on the way.

        Raises:
            ValueError: one that there is not.
        """
        formats: dict[str, WeightFormat | None] = {}
        sizes = self.kind.formats.rule
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
                formats[glob] = None if rule is None else self._chosen(**wanted)
            except (ValueError, NotImplementedError) as error:
                if glob == "*" and rule == {}:
                    raise ValueError(str(error)) from error
                raise ValueError(f"rules[{glob!r}]: {error}") from error
        if "*" not in (self.options.get("rules") or {}):
            del formats["*"]
        return formats

    def _chosen(self, **wanted: Any) -> WeightFormat:
        """The format of all layers, or with `wanted` that of a rule."""
        common = {k: v for k, v in self.options.items() if k in _COMMON}
        return self.kind.formats.choose(**{**_COMMON, **common, **wanted})

    @property
    def needs_calibration(self) -> bool:
        return self.kind.work.needs(self.settings()[0]).tokens

    @property
    def holds_multiples_of(self) -> tuple[int, ...]:
        names = ("group_size", "block_size")
        formats = [self._chosen(), *self._formats().values()]
        sizes = [size for fmt in formats for name in names if (size := getattr(fmt, name, None))]
        best = math.lcm(*sizes)
        if best == 1 or self.options.get("group_size", "auto") != "auto":
            return (best,)
        return (best, *(size for size in _SMALLER if size < best))

    @property
    def label(self) -> str:
        return f"quantize {self.method}{self.kind.formats.label(self.options)}"

    def run(self, context: Context) -> dict[str, Any]:
        context.expand_packed("to be quantized anew")
        options = {k: v for k, v in self.options.items() if k not in ("calibration", "rules")}
        if self.needs_calibration:
            options |= self._calibration(context)
        options |= {"progress": context.progress, **context.state()}
        report = quantize(context.model, self.method, rules=self._formats(), **options)
        return report.to_dict()

    def plan(self, before: Shapes, original: Shapes, found: Findings) -> Shapes:
        after = before.dense()
        default, rules = self._chosen(), self._formats()
        auto = self.options.get("group_size", "auto") == "auto"
        plan, dense = plan_formats(self.kind, after.model, default, rules, auto=auto, values=False)
        found.notes += size_notes(after.model, default, plan, rules)
        for name, fmt in plan.items() if not auto else ():
            _doubtful(name, fmt, after, found)
        found.left_alone(after.model, dense)
        after.formats = plan
        return after


def _doubtful(name: str, fmt: WeightFormat, after: Shapes, found: Findings) -> None:
    """Warn of a width that data may lead to and that the format cannot hold."""
    for K in after.widths.get(name, ()):
        try:
            check_formats({name: ((after.linears()[name][0], K), fmt)})
        except ValueError as error:
            if not any(name.rpartition(".")[2] in text for text in found.warnings):
                found.warnings.append(
                    f"an uneven pruning before it may leave widths that do not fit: {error}; or a "
                    "round_to that is a multiple of the group size"
                )
            return
