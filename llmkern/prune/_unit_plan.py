"""How many units each layer keeps: what can be thinned, to widths that the model can be built with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.calibrate import Block, walk
from llmkern.drive import check_values
from llmkern.models import (
    Units,
    block_linears,
    changed_config,
    find_blocks,
    find_units,
    skeleton,
    unit_overrides,
    write_widths,
)
from llmkern.models.linears import weight_rows
from llmkern.models.resize import other_setting, shapes_in, wanted_shapes
from llmkern.models.units import why_missing
from llmkern.prune._amount import Pattern
from llmkern.prune._columns import choose_units
from llmkern.prune._method import PruneJob
from llmkern.prune._options import WidthOptions
from llmkern.prune._scores import CentredStatistic, activation, has_bias, magnitude, output_loss
from llmkern.prune._widths import Layer, allowed_counts, even_counts, multiple_of, uneven_counts

Scores = dict[str, Tensor]  # full name of a layer -> importance of its units


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
            raise ValueError(_missing(name, block, kinds, found[index]))
        for units in here:
            key, full = (units.kind, len(units)), f"{name}.{units.consumer}"
            if key not in allowed:
                allowed[key] = allowed_counts(model, units, round_to, full)
            layers.append(Layer(index, full, units, allowed[key], units.parameters_per_unit(block)))
    return layers


def _missing(name: str, block: nn.Module, kinds: Sequence[str], found: list[Units]) -> str:
    plain = next((units for units in found if units.kind == "mlp"), None)
    if "glu" in kinds and plain is not None:
        first = ", ".join(plain.producers)
        return (
            f"{name}: got an MLP of two matrices ({first}, {plain.consumer}), expected gate, up and "
            "down: method 'mlp' prunes it"
        )
    names = {
        "glu": "gate, up and down",
        "mlp": "an MLP of two matrices",
        "attention": "attention heads",
    }
    wanted = " or ".join(names[kind] for kind in kinds)
    return (
        f"{name}: got a {type(block).__name__} without {wanted} of dense linears, expected them in every "
        f"block: {why_missing(block, kinds)}"
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
    _check_whole(model, layers, plan, uneven=options.allow_uneven)
    return plan


def _check_whole(model: nn.Module, layers: list[Layer], plan: WidthPlan, *, uneven: bool) -> None:
    """Refuse a config that changes more than the layers that are thinned, or their constants.

    Raises:
        ValueError: names the tensor or the constant.
    """
    blocks = find_blocks(model)
    wanted = dict(shapes_in(model))
    for layer in layers:
        prefix, _ = layer.name.rsplit(f".{layer.units.consumer}", 1)
        shapes = wanted_shapes(blocks.modules[layer.block], layer.units, plan.counts[layer.name])
        wanted |= {f"{prefix}.{name}": shape for name, shape in shapes.items()}
    config = changed_config(model.config, {} if uneven else plan.overrides)
    if uneven:
        write_widths(config, plan.per_block)
    built = skeleton(model, config)
    got = dict(shapes_in(built))
    odd = next((n for n in (*wanted, *got) if got.get(n) != wanted.get(n)), None)
    if odd is not None:
        why = f"{odd} would be {got.get(odd)}, not {wanted.get(odd)}"
    else:
        constant = other_setting(blocks.modules, find_blocks(built).modules, sizes=False)
        why = f"{blocks.name}.{constant}" if constant is not None else ""
    if why:
        raise ValueError(
            f"ratio: got widths {plan.overrides}, expected some that {type(model).__name__} can be built "
            f"with: {why}"
        )


def _rounding(layers: list[Layer], counts: dict[str, int], options: WidthOptions) -> list[str]:
    notes = []
    for kind in dict.fromkeys(layer.units.kind for layer in layers):
        first = next(layer for layer in layers if layer.units.kind == kind)
        kept = sorted({counts[layer.name] for layer in layers if layer.units.kind == kind})
        text = f"{' or '.join(map(str, kept))} of {len(first.units)} {first.units.what} stay"
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
            statistic = input_statistic(block, layer.units, windows.numel())
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

    walk(model, windows, measure, batch_size=job.data.batch_size, compute=job.data.compute_dtype)
    return costs


def input_statistic(block: Block, units: Units, tokens: int) -> CentredStatistic:
    linear = block.module.get_submodule(units.consumer)
    K, device = weight_rows(linear).shape[1], weight_rows(linear).device
    (statistic,) = block.collect(
        [(units.consumer,)], lambda group: CentredStatistic(K, tokens=tokens, device=device)
    )
    return statistic
