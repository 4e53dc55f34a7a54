"""Pruning of single weights, layer by layer: what magnitude, Wanda and SparseGPT share."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from llmkern._drive import Lines, Work, for_each_layer, layer_stage, plan_layers
from llmkern.calibrate import ActivationNormStatistic, HessianStatistic, walk
from llmkern.masks import record_pruning, zero_fraction
from llmkern.models.linears import dense_weight, write_weight
from llmkern.patch import winning_pattern
from llmkern.prune import owl
from llmkern.prune._amount import Amount, Pattern, check_fraction, parse_pattern
from llmkern.prune._job import Job
from llmkern.prune._report import LayerReport, PrunedWeight
from llmkern.prune._select import SCOPES

InputStatistic = ActivationNormStatistic | HessianStatistic


class Prune(Protocol):
    """A method on one weight."""

    def __call__(
        self, weight: Tensor, amount: Amount, statistic: Any, options: Any
    ) -> PrunedWeight:
        """Prune weight [N, K]; `statistic` is None where no data was asked for."""


@dataclass(frozen=True)
class LayerOptions:
    """Options that all methods on single weights have.

    Attributes:
        scope: for a sparsity: "layer" compares all weights of a layer, "row" those of each output row,
            so that all rows lose equally many. None is the method's own; a pattern has no scope.
        allocation: "uniform", or "owl" (arXiv 2310.05175): blocks with fewer outlying weights lose more,
            the model as much as with "uniform". Needs calibration data and a sparsity; layers with a
            rule of their own are left out.
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


def prune_layers(job: Job, *, prune: Prune, statistic: type[InputStatistic] | None) -> None:
    """Prune every planned linear of `job.model`.

    Args:
        job: its amount is a sparsity or pattern, its options a `LayerOptions`.
        prune: the method.
        statistic: of each layer's inputs, for `prune`; None where it looks at the weights alone.
    """
    plan, shared = plan_pruning(job)
    compensated = _compensated(job, plan)
    if statistic is None and compensated:
        statistic = ActivationNormStatistic
    by_outliers = job.options.allocation == "owl"
    if statistic is None and not by_outliers:
        job.refuse_calibration(f"method {job.report.method!r} looks at the weights only here")
    job.open_journal(calibrated=statistic is not None or by_outliers)
    if by_outliers:
        plan |= _by_outliers(job, shared)
    with _work(job, plan) as work:
        pruner = _Pruner(job, plan, compensated, prune, work)
        if job.journal is not None:
            lines = Lines(work, job.report.layers, LayerReport)
            job.journal.note(lines.take, lines.give)
        if statistic is None:
            for_each_layer(job.model, plan.__contains__, pruner.apply, journal=job.journal)
        else:
            _walk(job, pruner, statistic)


def _walk(job: Job, pruner: _Pruner, kind: type[InputStatistic]) -> None:
    windows = job.windows()

    def empty(weight: Tensor) -> InputStatistic:
        return kind(weight.shape[1], tokens=windows.numel(), device=weight.device)

    # Magnitude has no such option: its statistic only serves the biases.
    sequential = getattr(job.options, "true_sequential", False)
    stage = layer_stage(
        pruner.work, pruner.plan.__contains__, empty, pruner.apply, sequential=sequential
    )
    walk(job.model, windows, stage, batch_size=job.data.batch_size, journal=job.journal)


def _work(job: Job, plan: Mapping[str, Amount]) -> Work:
    """The progress bar; at the end the model's config says which layers have been pruned."""

    def record() -> None:
        lines = job.report.layers
        record_pruning(job.model, {line.name: line.pattern or line.sparsity for line in lines})

    return Work("prune", "pruned", len(plan), progress=job.progress, record=record)


@dataclass(frozen=True)
class _Pruner:
    """Prunes planned layers one by one; keeps the report."""

    job: Job
    plan: Mapping[str, Amount]
    compensated: frozenset[str]
    prune: Prune
    work: Work

    def apply(
        self, prefix: str, block: nn.Module, name: str, inputs: InputStatistic | None = None
    ) -> None:
        """Prune the linear `name` of a block."""
        full = f"{prefix}.{name}"
        start = time.perf_counter()
        linear, amount = block.get_submodule(name), self.plan[full]
        weight = dense_weight(linear)
        with self.work.layer(full):
            result = self.prune(weight, amount, inputs, self.job.options)
            shift = None
            if full in self.compensated and isinstance(inputs, ActivationNormStatistic):
                shift = _mean_of_removed(weight, result.weight, inputs)
            write_weight(linear, result.weight)
            if shift is not None:
                linear.get_parameter("bias").add_(shift)
        if not result.factored:
            warnings.warn(
                f"{full}: pruned by a simpler method, because no token reached it or its Hessian could "
                "not be factored at any damping",
                RuntimeWarning,
                stacklevel=2,
            )
        N, K = weight.shape
        self.job.report.layers.append(
            LayerReport(
                name=full,
                shape=(N, K),
                sparsity=zero_fraction(linear.get_parameter("weight")),
                pattern=str(amount) if isinstance(amount, Pattern) else None,
                loss=result.loss,
                relative_loss=result.relative_loss,
                damp=result.damp,
                factored=result.factored,
                bias_compensated=shift is not None,
                seconds=time.perf_counter() - start,
            )
        )
        self.work.finish(full, loss=f"{result.relative_loss:.2e}")


def _mean_of_removed(
    before: Tensor, after: Tensor, inputs: ActivationNormStatistic
) -> Tensor | None:
    """What the layer's output loses on average, [N]; None where no input ever came."""
    if inputs.rows == 0:
        return None
    return (before.float() - after.to(before.dtype).float()) @ inputs.mean()


def plan_pruning(job: Job) -> tuple[dict[str, Amount], frozenset[str]]:
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


def _by_outliers(job: Job, shared: frozenset[str]) -> dict[str, float]:
    """Sparsity of each of the layers that share the one asked for."""
    assert isinstance(job.amount, float)
    return owl.allocate(
        job,
        shared,
        job.amount,
        job.options.owl_threshold or owl.THRESHOLD,
        job.options.owl_lambda or owl.LAMBDA,
    )


def _check_patterns(asked: Mapping[str, tuple[int, Amount]]) -> None:
    bad = [
        (name, K, amount)
        for name, (K, amount) in asked.items()
        if isinstance(amount, Pattern) and K % amount.m
    ]
    if bad:
        name, K, amount = bad[0]
        more = f" and {len(bad) - 1} more layers" if len(bad) > 1 else ""
        raise ValueError(
            f"pattern: got {amount}, which does not divide K = {K} of {name}{more}; expected m to be a "
            f"divisor, or rules={{{name!r}: None}} to leave the layer as it is"
        )


def _compensated(job: Job, plan: Mapping[str, Amount]) -> frozenset[str]:
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
