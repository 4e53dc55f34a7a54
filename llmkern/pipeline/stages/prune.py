"""`llmkern.prune` as a stage of a pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from llmkern.drive import Findings, Shapes
from llmkern.pipeline._options import class_options, driver_options
from llmkern.pipeline.stages._stage import GIVEN, SOURCE, STATE, Context, Stage
from llmkern.prune import METHODS, Pattern, PruneMethod, PruneReport, prune
from llmkern.prune._amount import check_fraction, parse_pattern
from llmkern.prune._driver import sort_amount
from llmkern.prune._method import PruneJob
from llmkern.prune._widths import best_multiple

_AMOUNTS = ("sparsity", "pattern", "ratio")


class Prune(Stage[PruneMethod]):
    """`llmkern.prune` as a stage: `Prune("glu", ratio=0.25)`.

    Where no `round_to` is given, widths are rounded to what the stages after it can hold best, such as
    groups of 128, as long as that is at most a quarter of the width.

    What a method would decide by whether there is data (`PruneMethod.undecided`) is decided here without:
    magnitude pruning lets biases take up the mean of what is removed only where `bias_compensation` is
    asked for.
    """

    name = "prune"
    methods = METHODS
    default = "sparsegpt"
    _multiples: tuple[int, ...] = ()

    @classmethod
    def _known(cls, method: PruneMethod) -> dict[str, Any]:
        without = (*GIVEN, *STATE, *(a for a in _AMOUNTS if a not in method.amounts))
        known = driver_options(prune, without) | class_options(method.options)
        known |= class_options(cls.common) | {"calibration": SOURCE}
        if "sparsity" not in method.amounts:
            del known["rules"]
        return known

    def _plainer(self, name: str, value: Any) -> Any:
        if name == "pattern" and value is not None:
            return str(parse_pattern(value))
        if name == "rules" and isinstance(value, Mapping):
            return {k: str(v) if isinstance(v, Pattern) else v for k, v in value.items()}
        return value

    def _check(self) -> None:
        settings, _ = self.settings()
        sort_amount(self.kind, self._amounts())
        if not self.kind.needs_amount:
            amounts = [
                n for n in ("ratio", "target_params", "blocks") if n in self._known(self.kind)
            ]
            given = [name for name in amounts if self.options.get(name) is not None]
            if amounts and len(given) != 1:
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

    def _amounts(self) -> dict[str, Any]:
        return {name: self.options.get(name) for name in self.kind.amounts}

    @property
    def needs_calibration(self) -> bool:
        return self.kind.work.needs(self.settings()[0]).tokens

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
        options = {**self.kind.undecided, **self._round_to(context.model), **options}
        if self.needs_calibration:
            options |= self._calibration(context)
        options |= {"progress": context.progress, **context.state()}
        return prune(context.model, self.method, **options).to_dict()

    def fitted_to(self, multiples: tuple[int, ...]) -> Prune:
        if "round_to" not in self.takes(self.method) or "round_to" in self.options:
            return self
        fitted = Prune(self.method, **self.options)
        object.__setattr__(fitted, "_multiples", multiples)
        return fitted

    def _round_to(self, model: Any) -> dict[str, int]:
        """The multiple that widths are rounded to for the stages after this one, if there is any."""
        kinds = getattr(self.kind.work, "kinds", None)
        if not self._multiples or kinds is None:
            return {}
        with suppress(Exception):  # the driver will say what is wrong with the model
            size = best_multiple(
                model, kinds(self.settings()[0]), self.options.get("ratio"), self._multiples
            )
            return {} if size is None else {"round_to": size}
        return {}

    def plan(self, before: Shapes, original: Shapes, found: Findings) -> Shapes:
        dense = before.dense()
        rounded = self._round_to(dense.model)
        if rounded:
            found.notes.append(
                f"widths are rounded to multiples of {rounded['round_to']}, which the stages after it "
                "hold best; round_to says otherwise"
            )
        return self.kind.work.after(self.job(dense.model, **rounded), dense, found)

    def job(self, model: Any, **changes: Any) -> PruneJob:
        """What the driver would be told, of a model without data; `changes` to the method's options."""
        settings, data = self.settings()
        settings = dataclasses.replace(settings, **changes)
        amount, described = sort_amount(self.kind, self._amounts())
        report = PruneReport(self.method, described, dataclasses.asdict(settings))
        rules = dict(self.options.get("rules") or {})
        return PruneJob(model, settings, data, amount, rules, report, dry=True)
