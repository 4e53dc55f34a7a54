"""Pruning of single weights, layer by layer: what magnitude, Wanda and SparseGPT share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llmkern.calibrate import ActivationNormStatistic, InputStatistic
from llmkern.drive import (
    EachLinear,
    Findings,
    Layer,
    LayerRun,
    Lines,
    Needs,
    Progress,
    Shapes,
    Tokens,
    plan_layers,
)
from llmkern.masks import record_pruning, zero_fraction
from llmkern.models.linears import shape_of, write_weight
from llmkern.patch import winning_pattern
from llmkern.prune import owl
from llmkern.prune._amount import Amount, Pattern, check_fraction, parse_pattern
from llmkern.prune._method import PruneJob, PruneWork
from llmkern.prune._report import PrunedLayer, PrunedWeight
from llmkern.prune._select import SCOPES


@dataclass(frozen=True)
class LayerOptions:
    """Options that all methods on single weights have.

    Attributes:
        scope: for a sparsity: "layer" compares all weights of a layer, "row" those of each output row,
            so that all rows lose equally many. None is the method's own; a pattern has no scope.
        allocation: sparsity of each block: "uniform", or "owl" (arXiv 2310.05175): blocks with fewer
            outlying weights lose more, the model as much as with "uniform". Needs calibration data and a
            sparsity; layers with a rule of their own are left out.
        owl_threshold: a weight is an outlier above so many times its block's mean score; None: 5.
        owl_lambda: how far a block's sparsity may be from the one asked for; None: 0.08.
    """

    scope: str | None = None
    allocation: str = "uniform"
    owl_threshold: float | None = None
    owl_lambda: float | None = None

    def __post_init__(self) -> None:
        if self.scope is not None and self.scope not in SCOPES:
            raise ValueError(f"scope: got {self.scope!r}, expected 'layer' or 'row'")
        if self.allocation not in ("uniform", "owl"):
            raise ValueError(f"allocation: got {self.allocation!r}, expected 'uniform' or 'owl'")
        for name, top in (("owl_threshold", math.inf), ("owl_lambda", 1.0)):
            value = getattr(self, name)
            if value is not None and self.allocation != "owl":
                raise ValueError(
                    f"{name}: got {value}, expected allocation 'owl', or none of its options"
                )
            if value is not None and not 0 < value < top:
                raise ValueError(f"{name}: got {value}, expected a number in (0, {top})")


@dataclass(frozen=True)
class SingleWeights(PruneWork):
    """Every planned linear loses single weights.

    Attributes:
        function: (layer, options) -> `PrunedWeight`; the layer's `wanted` is its amount.
        statistic: class of what the function is told of each layer's inputs; None where it looks at the
            weights alone.
    """

    function: Callable[[Layer, Any], PrunedWeight]
    statistic: type[InputStatistic] | None = None

    def needs(self, settings: LayerOptions) -> Needs:
        """Tokens for a statistic, to share out a sparsity, and for biases where that is asked for."""
        compensated = bool(getattr(settings, "bias_compensation", None))
        by_outliers = settings.allocation == "owl"
        return Needs(tokens=self.statistic is not None or by_outliers or compensated)

    def nbytes(self, settings: LayerOptions, shapes: Shapes, tokens: Tokens) -> int:
        """Copies of the largest weight, and its statistic."""
        return EachLinear(self.function, self.statistic).nbytes(settings, shapes, tokens)

    def after(self, job: PruneJob, shapes: Shapes, found: Findings) -> Shapes:
        """The same shapes."""
        plan_pruning(job)
        found.left_alone(shapes.model, job.report.kept)
        return shapes

    def run(self, job: PruneJob) -> None:
        """Prune; the job's amount is a sparsity or pattern, its options a `LayerOptions`."""
        plan, shared = plan_pruning(job)
        compensated = _compensated(job, plan)
        statistic = self.statistic
        if statistic is None and compensated:
            statistic = ActivationNormStatistic
        by_outliers = job.options.allocation == "owl"
        if statistic is None and not by_outliers:
            job.refuse_calibration(f"method {job.report.method!r} looks at the weights only here")
        job.open_journal(calibrated=statistic is not None or by_outliers)
        if by_outliers:
            plan |= _by_outliers(job, shared)
        with _progress(job, plan) as progress:
            if job.journal is not None:
                lines = Lines(progress, job.report.layers, PrunedLayer)
                job.journal.note(lines.take, lines.give)
            run = LayerRun(
                model=job.model,
                settings=job.options,
                plan=plan,
                driver=_Driver(job, compensated, progress),
                progress=progress,
                windows=None if statistic is None else job.windows(),
                batch_size=job.data.batch_size,
                compute_dtype=job.data.compute_dtype,
                journal=job.journal,
            )
            EachLinear(self.function, statistic).run(run)


def _progress(job: PruneJob, plan: Mapping[str, Amount]) -> Progress:
    """The progress bar; at the end the model's config says which layers have been pruned."""

    def record() -> None:
        lines = job.report.layers
        record_pruning(job.model, {line.name: line.pattern or line.sparsity for line in lines})

    return Progress("prune", "pruned", len(plan), shown=job.progress, record=record)


class _Driver:
    """Writes pruned weights; keeps the report."""

    def __init__(self, job: PruneJob, compensated: frozenset[str], progress: Progress) -> None:
        self._job, self._compensated, self._progress = job, compensated, progress
        self._shifted: set[str] = set()

    def place(self, layer: Layer, result: PrunedWeight) -> None:
        """Overwrite the weight, and let the bias take up the mean of what is gone."""
        shift = None
        if layer.name in self._compensated and hasattr(layer.statistic, "mean"):
            shift = _mean_of_removed(layer.weight, result.weight, layer.statistic)
        write_weight(layer.module, result.weight)
        if shift is not None:
            layer.module.get_parameter("bias").add_(shift)
            self._shifted.add(layer.name)

    def report(self, layer: Layer, result: PrunedWeight, seconds: float) -> None:
        """Add the layer's line."""
        if not result.factored:
            warnings.warn(
                f"{layer.name}: pruned by a simpler method, because no token reached it or its Hessian "
                "could not be factored at any damping",
                RuntimeWarning,
                stacklevel=2,
            )
        self._job.report.layers.append(
            PrunedLayer(
                name=layer.name,
                shape=shape_of(layer.module),
                sparsity=zero_fraction(layer.module.get_parameter("weight")),
                pattern=str(layer.wanted) if isinstance(layer.wanted, Pattern) else None,
                loss=result.loss,
                relative_loss=result.relative_loss,
                damp=result.damp,
                factored=result.factored,
                bias_compensated=layer.name in self._shifted,
                seconds=seconds,
            )
        )
        self._progress.finish(layer.name, loss=f"{result.relative_loss:.2e}")


def _mean_of_removed(
    before: Tensor, after: Tensor, inputs: ActivationNormStatistic
) -> Tensor | None:
    """What the layer's output loses on average, [N]; None where no input ever came."""
    if inputs.rows == 0:
        return None
    return (before.float() - after.to(before.dtype).float()) @ inputs.mean()


def plan_pruning(job: PruneJob) -> tuple[dict[str, Amount], frozenset[str]]:
    """Amount of each layer to prune, all of it checked; and which layers no rule of their own names."""
    rules: dict[str, Amount | None] = {"*": job.amount}
    for glob, value in job.rules.items():
        argument = f"rules[{glob!r}]"
        if value is None:
            rules[glob] = None
        elif isinstance(value, int | float):
            rules[glob] = check_fraction(value, argument)
        else:
            rules[glob] = parse_pattern(value, argument)
    options: LayerOptions = job.options
    if options.scope is not None and not any(isinstance(v, float) for v in rules.values()):
        raise ValueError(
            f"scope: got {options.scope!r} with a pattern, expected None: a pattern has no scope"
        )
    plan: dict[str, Amount]
    plan, job.report.kept = plan_layers(
        job.model, rules, what="prune", check=_check_patterns, values=not job.dry
    )
    if options.allocation == "owl" and not isinstance(rules["*"], float):
        raise ValueError(f"allocation: got 'owl' with {rules['*']}, expected a sparsity to spread")
    return plan, frozenset(name for name in plan if winning_pattern(rules, name) == "*")


def _by_outliers(job: PruneJob, shared: frozenset[str]) -> dict[str, float]:
    """Sparsity of each of the layers that share the one asked for."""
    assert isinstance(job.amount, float)
    return owl.allocate(
        job,
        shared,
        job.amount,
        job.options.owl_threshold or owl.THRESHOLD,
        job.options.owl_lambda or owl.LAMBDA,
    )


def _check_patterns(asked: Mapping[str, tuple[tuple[int, int], Amount]]) -> None:
    bad = [
        (name, K, amount)
        for name, ((_, K), amount) in asked.items()
        if isinstance(amount, Pattern) and K % amount.m
    ]
    if bad:
        name, K, amount = bad[0]
        more = f" and {len(bad) - 1} more layers" if len(bad) > 1 else ""
        raise ValueError(
            f"pattern: got {amount}, which does not divide K = {K} of {name}{more}; expected m to be a "
            f"divisor, or rules={{{name!r}: None}} to leave the layer as it is"
        )


def _compensated(job: PruneJob, plan: Mapping[str, Amount]) -> frozenset[str]:
    """Names of the planned layers whose bias is to take up the mean of what they lose."""
    wanted = getattr(job.options, "bias_compensation", False)
    if wanted is False:
        return frozenset()
    found = [n for n in plan if job.model.get_submodule(n)._parameters.get("bias") is not None]
    if wanted and not found:
        raise ValueError(
            "bias_compensation: got True, expected None or False: no layer to be pruned has a bias"
        )
    return frozenset(found)
