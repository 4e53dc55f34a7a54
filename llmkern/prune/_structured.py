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
from llmkern.drive import Findings, Lines, Needs, Progress, Shapes, Tokens, check_values
from llmkern.drive.shapes import F32
from llmkern.masks import kept_mask, record_pruning, recorded_layers, zero_fraction
from llmkern.models import (
    Units,
    adopt_settings,
    block_linears,
    changed_config,
    find_blocks,
    find_units,
    keep_units,
    set_width,
    set_widths,
    skeleton,
    unit_overrides,
    write_widths,
)
from llmkern.models.linears import bias_of, set_bias, set_weight, weight_rows
from llmkern.prune._amount import Pattern
from llmkern.prune._columns import adjusted, choose_units
from llmkern.prune._method import PruneJob, PruneWork
from llmkern.prune._options import WidthOptions, one_of
from llmkern.prune._report import WidthReport
from llmkern.prune._scores import CentredStatistic, activation, has_bias, magnitude, output_loss
from llmkern.prune._widths import Layer, allowed_counts, even_counts, multiple_of, uneven_counts
from llmkern.prune.recovery import recover, recovery_journal, recovery_nbytes

Scores = dict[str, Tensor]  # full name of a layer -> importance of its units


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
        job.open_journal(calibrated=job.options.calibrated)
        scores = {} if self.scores is None else self.scores(job, layers)
        _prune_units(job, layers, scores)


def _prune_units(job: PruneJob, layers: list[Layer], scores: Scores) -> None:
    model, options, report = job.model, job.options, job.report
    plan = plan_widths(job, layers, scores or None)
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
                journal=job.journal,
            )
        else:
            visit(model, lambda index, _, block: thinner(index, block, None), journal=job.journal)
    if options.allow_uneven:
        set_widths(model, plan.per_block)
    else:
        set_width(model, plan.overrides)
    if options.recovery != "none":
        report.recovery_loss = recover(
            model,
            job.windows(),
            options,
            batch_size=job.data.batch_size,
            seed=job.data.seed,
            journal=job.journal,
        )


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
    evenly = dataclasses.replace(options, allow_uneven=False, keep_first=None, keep_last=None)
    plan = plan_widths(dataclasses.replace(job, options=evenly), layers)
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


def find_layers(
    model: nn.Module, kinds: Sequence[str], round_to: int | None, *, values: bool = True
) -> list[Layer]:
    """The layers to be thinned, in the order of execution.

    Args:
        model: a causal language model.
        kinds: of units, see `Units.kind`; each block must have a layer of one of them.
        round_to: what widths of MLPs are multiples of; None: see `multiple_of`.
        values: look at the weights' values; False for a model without data.

    Raises:
        ValueError: a block has no such units, or weights that cannot be worked on (named).
    """
    layers: list[Layer] = []
    allowed: dict[tuple[str, int], tuple[int, ...]] = {}
    for name, block in find_blocks(model).items():
        for linear, module in block_linears(block).items() if values else ():
            check_values(f"{name}.{linear}", module)
    found = find_units(model)
    for index, (name, block) in enumerate(find_blocks(model).items()):
        here = [units for units in found[index] if units.kind in kinds]
        if not here:
            raise ValueError(f"{name}: {_missing(kinds, found[index])}")
        for units in here:
            key = (units.kind, len(units))
            if key not in allowed:
                allowed[key] = allowed_counts(model, units, round_to)
            full = f"{name}.{units.consumer}"
            layers.append(Layer(index, full, units, allowed[key], units.parameters_per_unit(block)))
    return layers


def _missing(kinds: Sequence[str], found: list[Units]) -> str:
    plain = next((units for units in found if units.kind == "mlp"), None)
    if "glu" in kinds and plain is not None:
        first = ", ".join(plain.producers)
        return (
            f"got an MLP of two matrices ({first}, {plain.consumer}), expected gate, up and down: "
            "method 'mlp' prunes it"
        )
    names = {"glu": "gate, up and down", "mlp": "an MLP", "attention": "attention heads"}
    return (
        f"got no {' or '.join(names[kind] for kind in kinds)} of dense linears in it: packed layers, MoE "
        "experts and latent attention are not pruned"
    )


@dataclass
class WidthPlan:
    """What becomes of the widths of a model."""

    counts: dict[str, int]  # full name of a layer -> units that it keeps
    overrides: dict[str, Any]  # config entries, where all blocks have one width
    per_block: list[dict[str, Any]]  # those of each block, where they differ
    notes: list[str]


def plan_widths(job: PruneJob, layers: list[Layer], scores: Scores | None = None) -> WidthPlan:
    """How many units each layer keeps, checked against what the model class can be built with."""
    model, options = job.model, job.options
    plan = WidthPlan({}, {}, [{} for _ in find_blocks(model).modules], [])
    if options.allow_uneven:
        plan.counts = _uneven(job, layers, scores)
        plan.notes.append("the blocks have widths of their own: only llmkern.load reads the result")
    else:
        assert not isinstance(job.amount, Pattern)
        even = even_counts(model, layers, job.amount, options.target_params)
        plan.counts = {layer.name: even[layer.units.kind] for layer in layers}
    known: dict[tuple[str, int], dict[str, Any]] = {}
    for layer in layers:
        count = plan.counts[layer.name]
        if count == len(layer.units):
            continue
        key = (layer.units.kind, count)
        if key not in known:
            known[key] = unit_overrides(
                model, layer.units, count, name=layer.name, index=layer.block
            )
        plan.per_block[layer.block] |= known[key]
        plan.overrides |= known[key]
    plan.notes += _rounding(layers, plan.counts, options)
    return plan


def _rounding(layers: list[Layer], counts: dict[str, int], options: WidthOptions) -> list[str]:
    notes = []
    for kind in dict.fromkeys(layer.units.kind for layer in layers):
        first = next(layer for layer in layers if layer.units.kind == kind)
        kept = sorted({counts[layer.name] for layer in layers if layer.units.kind == kind})
        what = "key/value heads" if kind == "attention" else "neurons"
        text = f"{' or '.join(map(str, kept))} of {len(first.units)} {what} stay"
        if kind != "attention":
            text += (
                f", rounded to a multiple of {options.round_to or multiple_of(len(first.units))}"
            )
            if any(count % 128 for count in kept):
                text += ": int4 groups of 128 and llama.cpp's K-quants do not fit such a width"
        notes.append(text)
    return notes


def _uneven(job: PruneJob, layers: list[Layer], scores: Scores | None) -> dict[str, int]:
    """Units that each layer keeps, by a ranking of what their removal costs over all blocks."""
    model, options = job.model, job.options
    assert not isinstance(job.amount, Pattern)
    depth = len(find_blocks(model))
    first = 1 if options.keep_first is None else options.keep_first
    last = 1 if options.keep_last is None else options.keep_last
    free = [layer for layer in layers if first <= layer.block < depth - last]
    if not free:
        raise ValueError(
            f"keep_first, keep_last: got {first} and {last}, which leave none of the {depth} blocks to "
            "prune"
        )
    costs = _costs(job, free, scores)
    counts = {layer.name: len(layer.units) for layer in layers}
    present = sum(p.numel() for p in model.parameters())
    for kind in dict.fromkeys(layer.units.kind for layer in free):
        group = [layer for layer in free if layer.units.kind == kind]
        every = [layer for layer in layers if layer.units.kind == kind]
        if job.amount is not None:
            remove = round(job.amount * sum(len(layer.units) for layer in every))
        else:
            assert options.target_params is not None
            # Both kinds give the same share.
            share = sum(len(la.units) * la.per_unit for la in layers)
            excess = max(present - options.target_params, 0) / share
            remove = -int(-excess * sum(len(layer.units) for layer in every) // 1)
        kept = uneven_counts(group, [costs[layer.name] for layer in group], remove)
        counts |= {layer.name: count for layer, count in zip(group, kept, strict=True)}
    if job.amount != 0 and all(counts[la.name] == len(la.units) for la in layers):
        raise ValueError(
            f"ratio: got {job.amount}, which rounds to nothing in {len(free)} blocks, expected more"
        )
    return counts


def _costs(job: PruneJob, layers: list[Layer], scores: Scores | None) -> Scores:
    """For each layer what removing the next unit costs, [units], as a fraction of the whole."""
    if scores is not None:  # gradients are changes of the model's own loss: comparable as they are
        return {layer.name: scores[layer.name].sort().values for layer in layers}
    model, options = job.model, job.options
    costs: Scores = {}
    by_block: dict[int, list[Layer]] = {}
    for layer in layers:
        by_block.setdefault(layer.block, []).append(layer)
    if options.importance == "magnitude":
        for layer in layers:
            block = find_blocks(model).modules[layer.block]
            cost = magnitude(block, layer.units).sort().values
            costs[layer.name] = cost / cost.sum()
        return costs
    windows = job.windows()

    def measure(block: Block) -> None:
        here = by_block.get(block.index, [])
        if not here:
            return
        block.groups()
        for layer in here:
            statistic = _statistic(block, layer.units, windows.numel())
            weight = weight_rows(block.module.get_submodule(layer.units.consumer))
            centred = options.compensate and has_bias(block.module, layer.units)
            H = statistic.moments(centred=centred)
            if options.importance == "obs":
                remove = len(layer.units) - layer.allowed[0]
                _, cost = choose_units(weight, H, layer.units, remove, options.damp)
            else:
                cost = activation(block.module, layer.units, H).square().sort().values
            energy = output_loss(weight, torch.zeros_like(weight), H)[0]
            costs[layer.name] = cost / energy if energy > 0 else cost

    walk(model, windows, measure, batch_size=job.data.batch_size)
    return costs


def _statistic(block: Block, units: Units, tokens: int) -> CentredStatistic:
    linear = block.module.get_submodule(units.consumer)
    K, device = weight_rows(linear).shape[1], weight_rows(linear).device
    (statistic,) = block.collect(
        [(units.consumer,)], lambda group: CentredStatistic(K, tokens=tokens, device=device)
    )
    return statistic


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
            statistic = _statistic(block, units, self._job.windows().numel())
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
