"""Remove units (neurons, heads) from every block: the plan, the walk, the config.

The walk goes block by block. A layer's statistics come from the pruned blocks and layers before it;
its least important units go with all that makes and reads them, and what is left of the matrix that
read them is adjusted.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.calibrate import Block, visit, walk
from llmkern.drive import Findings, Lines, Needs, Progress, Shapes, Tokens
from llmkern.drive.shapes import F32
from llmkern.masks import kept_mask, record_pruning, recorded_layers, zero_fraction
from llmkern.models import (
    adopt_settings,
    changed_config,
    check_reload,
    find_blocks,
    keep_units,
    set_width,
    set_widths,
    skeleton,
    write_widths,
)
from llmkern.models.linears import bias_of, set_bias, set_weight, weight_rows
from llmkern.prune._columns import adjusted, choose_units
from llmkern.prune._method import PruneJob, PruneWork
from llmkern.prune._options import WidthOptions, one_of
from llmkern.prune._report import WidthReport
from llmkern.prune._scores import activation, has_bias, magnitude, output_loss
from llmkern.prune._unit_plan import Scores, WidthPlan, find_layers, input_statistic, plan_widths
from llmkern.prune._widths import Layer
from llmkern.prune.recovery import recover_job, recovery_journal, recovery_nbytes

# Matrices [K, K] in float32 that live at once while columns are removed: H filled, centred, permuted, its
# inverse, the part that stays and its factor.
_COLUMN_HESSIANS = 7


@dataclass(frozen=True)
class UnitWork(PruneWork):
    """The least important units of every block go, with all that makes and reads them.

    Attributes:
        kinds: (options) -> kinds of units, see `Units.kind`; each block must have a layer of one of them.
        scores: (job, layers) -> importance of the units of every layer; None: by the option `importance`.
    """

    kinds: Callable[[Any], tuple[str, ...]]
    scores: Callable[[PruneJob, list[Layer]], Scores] | None = None

    def needs(self, settings: WidthOptions) -> Needs:
        """Tokens, but for magnitudes alone."""
        return Needs(tokens=settings.calibrated, gradients=self.scores is not None)

    def nbytes(self, settings: Any, shapes: Shapes, tokens: Tokens) -> int:
        """Copies of the largest layer, and the matrices that its columns are chosen by."""
        per_layer = 2 if not settings.calibrated else 3
        hessians = _COLUMN_HESSIANS if settings.calibrated else 0
        return max(
            (per_layer * N * K + hessians * K * K) * F32 for N, K in shapes.linears().values()
        )

    def nbytes_after(self, settings: Any, after: Shapes, batch: int, tokens: Tokens) -> int:
        """Of the recovery."""
        return recovery_nbytes(settings, after, batch, tokens)

    def nbytes_journal(self, settings: Any, after: Shapes, tokens: Tokens) -> int:
        """The blocks, and the state of the recovery."""
        blocks = super().nbytes_journal(settings, after, tokens)
        return blocks + recovery_journal(settings, after)

    def after(self, job: PruneJob, shapes: Shapes, found: Findings) -> Shapes:
        """The widths that the ratio asks for, on average where only data will tell."""
        return narrower(job, self.kinds(job.options), shapes, found)

    def run(self, job: PruneJob) -> None:
        """Remove the units.

        Raises:
            ValueError: a block without such units, weights that cannot be worked on, a width that the
                model class cannot be built with (all named, before the model is touched); NaN or Inf in
                calibration activations.
        """
        check_job(job)
        layers = find_layers(job.model, self.kinds(job.options), job.options.round_to)
        # Where data decides on widths, at least that the model can have others.
        even = _evenly(job, layers)
        job.open_journal(calibrated=job.options.calibrated)
        scores = {} if self.scores is None else self.scores(job, layers)
        plan = plan_widths(job, layers, scores or None) if job.options.allow_uneven else even
        _prune_units(job, layers, scores, plan)


def _evenly(job: PruneJob, layers: list[Layer]) -> WidthPlan:
    """One width for all blocks, whatever the options say."""
    options = dataclasses.replace(job.options, allow_uneven=False, keep_first=None, keep_last=None)
    return plan_widths(dataclasses.replace(job, options=options), layers)


def _prune_units(job: PruneJob, layers: list[Layer], scores: Scores, plan: WidthPlan) -> None:
    model, options, report = job.model, job.options, job.report
    config = changed_config(model.config, {} if options.allow_uneven else plan.overrides)
    if options.allow_uneven:
        write_widths(config, plan.per_block)
    twins = find_blocks(skeleton(model, config)).modules
    report.notes += plan.notes
    with Progress("prune", "pruned", len(plan.counts), shown=job.progress) as progress:
        thinner = _Thinner(job, layers, plan.counts, scores, twins, progress)
        if job.journal is not None:
            job.journal.note(thinner.take, thinner.give)
        if options.calibrated:
            walk(
                model,
                job.windows(),
                lambda block: thinner(block.index, block.module, block),
                batch_size=job.data.batch_size,
                compute=job.data.compute_dtype,
                journal=job.journal,
            )
        else:
            visit(model, lambda index, _, block: thinner(index, block, None), journal=job.journal)
    if options.allow_uneven:
        set_widths(model, plan.per_block)
    else:
        set_width(model, plan.overrides)
    check_reload(model)
    recover_job(job)


def narrower(job: PruneJob, kinds: Sequence[str], shapes: Shapes, found: Findings) -> Shapes:
    """What is left of a model without data when units have gone; see `PruneWork.after`."""
    model, options = shapes.model, job.options
    try:
        layers = find_layers(model, kinds, options.round_to, values=False)
    except (RuntimeError, TypeError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        found.warnings.append(
            f"{type(model).__name__}: its widths cannot be planned before it is loaded ({reason})"
        )
        return shapes
    plan = _evenly(job, layers)
    if options.allow_uneven:
        found.notes.append("the blocks get widths of their own: only llmkern.load reads the result")
    else:
        found.notes += plan.notes
    made = skeleton(model, changed_config(model.config, plan.overrides))
    after = shapes.with_model(made.to(shapes.dtype))
    if options.allow_uneven:
        for layer in layers:
            size = layer.units.columns.shape[1]
            after.widths[layer.name] = tuple(count * size for count in layer.allowed)
    return after


def check_job(job: PruneJob) -> None:
    """Refuse what a method that removes neurons or heads has no use for.

    Raises:
        ValueError: rules, neither or both of ratio and target_params, or calibration data where
            neither importance nor compensation nor recovery reads any.
    """
    one_of(ratio=job.amount, target_params=job.options.target_params)
    if job.rules:
        raise ValueError(
            f"rules: got {dict(job.rules)}, expected none: whole neurons and heads go from every block"
        )
    if not job.options.calibrated:
        job.refuse_calibration("importance 'magnitude' without compensate or recovery")


class _Thinner:
    """Thins the layers of one block after the other."""

    def __init__(
        self,
        job: PruneJob,
        layers: list[Layer],
        counts: dict[str, int],
        scores: Scores,
        twins: nn.ModuleList,
        progress: Progress,
    ) -> None:
        self._job = job
        self._options = job.options
        self._layers = layers
        self._counts = counts
        self._scores = scores
        self._twins = twins
        self._progress = progress
        self._lines = Lines(progress, job.report.widths, WidthReport)

    def __call__(self, index: int, module: nn.Module, block: Block | None) -> None:
        here = [layer for layer in self._layers if layer.block == index]
        if block is not None:
            block.groups()
        for layer in here:
            start = time.perf_counter()
            with self._progress.layer(layer.name):
                loss, relative = self._thin(layer, module, block)
            # What follows in this block already runs with it.
            parent = layer.units.consumer.rpartition(".")[0]
            twin = self._twins[index].get_submodule(parent)
            adopt_settings(module.get_submodule(parent), twin)
            self._job.report.widths.append(
                WidthReport(
                    name=layer.name,
                    kind=layer.units.kind,
                    before=len(layer.units),
                    after=self._counts[layer.name],
                    loss=loss,
                    relative_loss=relative,
                    seconds=time.perf_counter() - start,
                )
            )
            self._progress.finish(layer.name)
        adopt_settings(module, self._twins[index])

    def take(self, index: int) -> dict[str, Any]:
        """For the journal: a block's lines, and what the config says of its layers' zeros."""
        names = {layer.name for layer in self._layers if layer.block == index}
        recorded = {n: v for n, v in recorded_layers(self._job.model).items() if n in names}
        return self._lines.take(index) | {"recorded": recorded}

    def give(self, index: int, block: nn.Module, notes: dict[str, Any]) -> None:
        """Bring back what `take` said of a block whose weights are there again."""
        self._lines.give(index, block, notes)
        adopt_settings(block, self._twins[index])
        if notes["recorded"]:
            record_pruning(self._job.model, notes["recorded"])

    def _thin(
        self, layer: Layer, module: nn.Module, block: Block | None
    ) -> tuple[float | None, float | None]:
        """Remove the layer's least important units; (loss, relative loss) of its outputs."""
        units, count = layer.units, self._counts[layer.name]
        if count == len(units):
            return None, None
        linear = module.get_submodule(units.consumer)
        weight = weight_rows(linear)
        centred = self._options.compensate and has_bias(module, units)
        statistic = H = None
        if block is not None:
            statistic = input_statistic(block, units, self._job.windows().numel())
            H = statistic.moments(centred=centred)
        kept = self._choose(layer, module, H, count)
        columns = units.columns[kept].flatten().sort().values.to(weight.device)
        whole = torch.zeros_like(weight, dtype=torch.float32)
        whole[:, columns] = weight[:, columns].float()
        loss: tuple[float | None, float | None] = None, None
        if statistic is not None and H is not None:
            if self._options.compensate:
                recorded = layer.name in recorded_layers(self._job.model)
                held = kept_mask(weight, recorded=recorded, keep_zeros=None)
                whole[:, columns], factored = adjusted(weight, H, columns, self._options.damp, held)
                if not factored:
                    warnings.warn(
                        f"{layer.name}: not adjusted to what is gone, because its Hessian could not be "
                        "factored at any damping",
                        RuntimeWarning,
                        stacklevel=2,
                    )
            loss = output_loss(weight, whole, H)
            bias = bias_of(linear)
            if centred and bias is not None:
                set_bias(linear, bias.float() + (weight.float() - whole) @ statistic.mean())
        keep_units(module, units, kept)
        set_weight(linear, whole[:, columns])
        self._record(layer.name, linear)
        return loss

    def _record(self, name: str, linear: nn.Module) -> None:
        """What a pattern along K has become, now that columns are missing from it."""
        if name in recorded_layers(self._job.model):
            fraction = zero_fraction(weight_rows(linear))
            record_pruning(self._job.model, {name: fraction})

    def _choose(self, layer: Layer, module: nn.Module, H: Tensor | None, count: int) -> Tensor:
        units = layer.units
        if layer.name in self._scores:
            score = self._scores[layer.name]
        elif self._options.importance == "magnitude":
            score = magnitude(module, units)
        else:
            assert H is not None
            if self._options.importance == "obs":
                weight = weight_rows(module.get_submodule(units.consumer))
                return choose_units(weight, H, units, len(units) - count, self._options.damp)[0]
            score = activation(module, units, H)
        return score.argsort(descending=True, stable=True)[:count].sort().values
