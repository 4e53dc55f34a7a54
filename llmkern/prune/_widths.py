"""How many units each layer keeps: one width for all blocks, or one per block by global ranking.

A width that formats can hold is a multiple of 256 (llama.cpp's K-quants), else of 128 (groups of int4
weights), and for models too small for either of 32 (the smallest group).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmkern.models import Units, find_units, head_counts

# A multiple is taken if it is at most this fraction of the width, so that rounding stays a detail.
_FINEST_STEP = 1 / 16
_MULTIPLES = (256, 128, 32)


@dataclass(frozen=True)
class Layer:
    """The units of one block that are to be thinned.

    Attributes:
        block: index of the block.
        name: full dotted name of the linear that reads the units.
        units: where they are.
        allowed: how many may be left, ascending, the present number included.
        per_unit: parameters that go with one.
    """

    block: int
    name: str
    units: Units
    allowed: tuple[int, ...]
    per_unit: int


def multiple_of(width: int) -> int:
    """The multiple to which the width of an MLP of `width` neurons is rounded."""
    fitting = [m for m in _MULTIPLES if m <= width * _FINEST_STEP]
    return fitting[0] if fitting else _MULTIPLES[-1]


def best_multiple(
    model: nn.Module, kinds: Sequence[str], ratio: float | None, multiples: Sequence[int]
) -> int | None:
    """The first of `multiples` to which the widths of the model's MLPs can be rounded; None: leave it.

    One that is more than a quarter of a width, or at which nothing would go, is passed over; so are all,
    where what is rounded to without them holds the best already.
    """
    widths = {len(u) for block in find_units(model) for u in block if u.kind in kinds}
    widths -= {len(u) for block in find_units(model) for u in block if u.kind == "attention"}
    for multiple in multiples:
        if not widths or all(multiple_of(width) % multiple == 0 for width in widths):
            return None
        kept = [round(width * (1 - (ratio or 0)) / multiple) * multiple for width in widths]
        small = all(multiple <= width / 4 for width in widths)
        if small and (not ratio or any(k < w for k, w in zip(kept, widths, strict=True))):
            return multiple
    return None


def allowed_counts(
    model: nn.Module, units: Units, round_to: int | None, name: str
) -> tuple[int, ...]:
    """Numbers of units that may be left, ascending, the present number last."""
    if units.kind == "attention":
        return tuple(head_counts(model, units, name))
    step = round_to or multiple_of(len(units))
    return (*range(step, len(units), step), len(units))


def even_counts(
    model: nn.Module, layers: Sequence[Layer], ratio: float | None, target_params: int | None
) -> dict[str, int]:
    """The number of units that every block keeps, by kind.

    Raises:
        ValueError: the blocks have different widths, nothing would be removed, or no width is small
            enough for the target.
    """
    kinds = {layer.units.kind: layer for layer in reversed(layers)}
    for layer in layers:
        first = kinds[layer.units.kind]
        if len(layer.units) != len(first.units):
            raise ValueError(
                f"{layer.name}: got {len(layer.units)} units, expected {len(first.units)} as in "
                f"{first.name}: blocks of different widths are pruned with allow_uneven"
            )
    if ratio is not None:
        counts = {kind: nearest(layer, ratio) for kind, layer in kinds.items()}
        if ratio > 0 and all(counts[k] == len(layer.units) for k, layer in kinds.items()):
            raise ValueError(f"ratio: got {ratio}, {_choices(list(kinds.values()))}")
        return counts
    assert target_params is not None
    ratios = {1 - c / len(layer.units) for layer in kinds.values() for c in layer.allowed}
    present = sum(p.numel() for p in model.parameters())
    for candidate in sorted(ratios):
        counts = {kind: nearest(layer, candidate) for kind, layer in kinds.items()}
        left = present - sum(
            (len(layer.units) - counts[layer.units.kind]) * layer.per_unit for layer in layers
        )
        if left <= target_params:
            return counts
    raise ValueError(
        f"target_params: got {target_params}, expected at least {left}: the model has {present}, and "
        "no narrower width is left"
    )


def nearest(layer: Layer, ratio: float) -> int:
    """The allowed number of units nearest to leaving out `ratio` of them; of two, the larger."""
    wanted = len(layer.units) * (1 - ratio)
    return min(reversed(layer.allowed), key=lambda count: abs(count - wanted))


def _choices(layers: Sequence[Layer]) -> str:
    parts = []
    for layer in layers:
        ratios = [f"{1 - c / len(layer.units):.3g}" for c in reversed(layer.allowed[:-1])]
        what = f"{layer.name} has {len(layer.units)} {layer.units.what}"
        if ratios:
            shown = ", ".join(ratios[:4]) + (" ..." if len(ratios) > 4 else "")
            parts.append(f"{what} and can lose {shown} of them")
        else:
            parts.append(f"{what} and can lose none")
    expected = "such a fraction" if any(len(la.allowed) > 1 for la in layers) else "another method"
    return f"which rounds to nothing: {'; '.join(parts)}; expected {expected}"


def uneven_counts(layers: Sequence[Layer], costs: Sequence[Tensor], remove: int) -> list[int]:
    """How many units each layer keeps when `remove` go in all, those of the least cost first.

    Args:
        layers: of one kind.
        costs: per layer, [units]: the cost of removing the next unit after those before it.
        remove: units in all; met as nearly as the allowed counts permit.

    Returns:
        The number that each layer keeps.
    """
    kept = [len(layer.units) for layer in layers]
    sums = [torch.cat((torch.zeros(1), c.double().cumsum(0).float())).tolist() for c in costs]
    removed = 0
    while removed < remove:
        steps = []
        for index, layer in enumerate(layers):
            lower = [count for count in layer.allowed if count < kept[index]]
            if lower:
                now, then = (len(layer.units) - count for count in (kept[index], lower[-1]))
                steps.append(
                    ((sums[index][then] - sums[index][now]) / (then - now), index, lower[-1])
                )
        if not steps:
            break
        _, index, count = min(steps)
        step = kept[index] - count
        if removed + step - remove > remove - removed:
            break  # nearer without it
        removed += step
        kept[index] = count
    return kept
