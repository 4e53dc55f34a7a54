"""What makes the tensor that linears read: the norm or linear whose output may be scaled in their stead.

Dividing a feature of what linears read by s, and multiplying their columns of it by s, leaves a block as
it was. Methods that smooth activations or scale salient columns need the place where the division can
be folded into weights:

    norm -> q, k, v        w / s (a norm that computes with 1 + w: (1 + w) / s - 1), b / s
    v -> o                 rows of v; averaging over tokens keeps features apart
    up -> down             rows of up, which is multiplied by what the gate lets through
    fc1 -> fc2             only across an activation f with f(x / s) = f(x) / s, such as ReLU

Candidates are found by structure, and each is tried: it counts if the block's output stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.models.linears import bias_of, is_linear, weight_rows
from llmkern.models.units import Units, block_units, linear_inputs, same_tensor

# Features are multiplied by 1 or 8 in a trial, exactly in every dtype: enough to show that what lies
# between source and consumer is no multiple of its input.
_TRIAL = 0.125
# Of the change that scaling the source alone makes, what may be left: rounding of 1 + w.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_TOLERANCE_16_BITS = 2e-2


@dataclass(frozen=True)
class Source:
    """What makes the features that a group of linears reads.

    Attributes:
        name: inside the block.
        kind: "norm" or "linear".
        rows: int64 [K], the feature of its output that makes each column of the linears.
        offset: a norm multiplies by offset + weight: 0 or 1.
    """

    name: str
    kind: str
    rows: Tensor
    offset: int = 0

    @property
    def tie(self) -> Tensor | None:
        """int64 [K]: columns of one value are made by one feature (the query heads of a key/value head),
        so that their scales must be equal; None where each column has a feature of its own.
        """
        return None if len(torch.unique(self.rows)) == len(self.rows) else self.rows


def find_sources(
    block: nn.Module, run: Callable[[], Any], groups: Sequence[tuple[str, ...]]
) -> list[Source | None]:
    """The source of each group of linears of a block.

    Args:
        block: dense, in evaluation mode, with data in its weights, which are as before at the end. That
            another block shares them cannot be seen from here.
        run: runs the block on a few tokens and returns its output.
        groups: names of linears that read the same tensor.

    Returns:
        A `Source` per group, or None where nothing can be scaled in its stead.

    Raises:
        ValueError: NaN or Inf in the block's activations (the layer is named).
    """
    with torch.no_grad():
        norms = _norms(block, run, groups)
        found = {(units.consumer,): units for units in block_units(block, run)}
        before = _first(run())
        sources: list[Source | None] = []
        for group in groups:
            candidates = _of_norm(block, norms.get(group))
            if group in found:
                candidates = [*candidates, *_of_units(found[group])]
            working = (c for c in candidates if _holds(block, run, before, c, group))
            sources.append(next(working, None))
    return sources


def fold(block: nn.Module, source: Source, s: Tensor) -> None:
    """Divide what `source` makes by `s`, in its weights.

    The block is as before once the columns of the linears that read it are multiplied by `s`.

    Args:
        block: as for `find_sources`.
        source: found there.
        s: positive [K], equal where `source.tie` is.

    Raises:
        ValueError: another shape, numbers that are not positive and finite, or that differ inside a tie.
    """
    if s.shape != source.rows.shape:
        raise ValueError(f"s: got {list(s.shape)}, expected {list(source.rows.shape)}")
    if not bool((torch.isfinite(s) & (s > 0)).all()):
        raise ValueError("s: got numbers that are not positive and finite, expected some that are")
    module = block.get_submodule(source.name)
    weight = weight_rows(module) if source.kind == "linear" else module.get_parameter("weight")
    rows, s = source.rows.to(weight.device), s.to(weight.device, torch.float64)
    per_row = torch.ones(len(weight), dtype=torch.float64, device=weight.device)
    per_row[rows] = s
    if not torch.equal(per_row[rows], s):
        raise ValueError("s: got scales that differ inside a tie, expected equal ones")
    bias = bias_of(module)
    with torch.no_grad():
        if source.kind == "linear":
            weight.copy_(weight.double() / per_row[:, None])
        else:
            weight.copy_((weight.double() + source.offset) / per_row - source.offset)
        if bias is not None:
            bias.copy_(bias.double() / per_row)


def scale_columns(linear: nn.Module, s: Tensor) -> None:
    """Multiply the columns of a dense linear's weight by `s` [K], in place."""
    weight = weight_rows(linear)
    weight.copy_(weight.double() * s.to(weight.device, torch.float64))


@dataclass(frozen=True)
class _Norm:
    """A norm that made what a group reads, and how it was called."""

    name: str
    call: Callable[[], Tensor]
    out: Tensor


def _norms(
    block: nn.Module, run: Callable[[], Any], groups: Sequence[tuple[str, ...]]
) -> dict[tuple[str, ...], _Norm]:
    made: list[_Norm] = []

    def record(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            # A copy: the block may add to the tensor in place afterwards.
            held = [a.clone() if isinstance(a, Tensor) else a for a in args]
            made.append(_Norm(name, lambda: _first(module.forward(*held)), _first(out)))

        return hook

    with ExitStack() as stack:
        for name, module in block.named_modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() == 1 and not is_linear(module):
                stack.callback(module.register_forward_hook(record(name)).remove)
        reads = linear_inputs(block, run)
    found = {}
    for group in groups:
        x = reads.get(group[0])
        maker = next((n for n in made if x is not None and same_tensor(n.out, x)), None)
        if maker is not None:
            found[group] = maker
    return found


def _of_norm(block: nn.Module, norm: _Norm | None) -> list[Source]:
    """The norm as a source, if it scales its output by its weight, or by 1 + weight."""
    if norm is None:
        return []
    module = block.get_submodule(norm.name)
    width = norm.out.shape[-1]
    if len(module.get_parameter("weight")) != width:
        return []
    s, before = _trial(torch.arange(width)).to(norm.out), norm.call()
    for offset in (0, 1):
        source = Source(norm.name, "norm", torch.arange(width), offset)
        with _kept(module):
            fold(block, source, s)
            after = norm.call()
        if _is_left(after * s - before, before):
            return [source]
    return []


def _of_units(units: Units) -> Iterator[Source]:
    """Each part of the producers' rows that has one row per column, or per head's column."""
    width = units.head_dim or 1
    columns = units.columns.flatten()
    for name, rows in reversed(units.producers.items()):
        for start in reversed(range(0, rows.shape[1], width)):
            part = rows[:, start : start + width]
            made = part.repeat(1, units.columns.shape[1] // width).flatten()
            order = torch.empty_like(columns)
            order[columns] = made
            yield Source(name, "linear", order)


def _holds(
    block: nn.Module,
    run: Callable[[], Any],
    before: Tensor,
    source: Source,
    group: tuple[str, ...],
) -> bool:
    """Whether the block's output stays as it was where source and linears are scaled, and only then."""
    s = _trial(source.rows)
    linears = [block.get_submodule(name) for name in group]
    with _kept(block.get_submodule(source.name), *linears):
        fold(block, source, s)
        alone = _first(run())
        for linear in linears:
            scale_columns(linear, s)
        both = _first(run())
    return _is_left(both - before, alone - before)


def _trial(rows: Tensor) -> Tensor:
    """Scales of 1 and `_TRIAL`, by chance, equal where rows are."""
    chance = torch.rand(int(rows.max()) + 1, generator=torch.Generator().manual_seed(0))
    return torch.where(chance[rows] < 0.5, 1.0, _TRIAL)


def _is_left(rest: Tensor, whole: Tensor) -> bool:
    """Whether `rest` is rounding alone beside `whole`."""
    size = float(whole.double().norm())
    return size > 0 and float(rest.double().norm()) <= size * _TOLERANCE.get(
        whole.dtype, _TOLERANCE_16_BITS
    )


@contextmanager
def _kept(*modules: nn.Module) -> Iterator[None]:
    """Puts the parameters of modules back in the end."""
    held = [(p, p.detach().clone()) for module in modules for p in module.parameters()]
    try:
        yield
    finally:
        for parameter, value in held:
            parameter.data.copy_(value)


def _first(out: Any) -> Tensor:
    tensor: Tensor = out[0] if isinstance(out, tuple) else out
    return tensor
