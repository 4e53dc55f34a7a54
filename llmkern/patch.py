"""Replace the linear layers of a model by packed ones, by rule."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Generic, TypeVar

from torch import nn

from llmkern.formats import FORMATS, WeightFormat
from llmkern.formats.int4 import QuantFormat
from llmkern.models import left_share
from llmkern.models.conv1d import as_conv1d, conv1d_places
from llmkern.models.experts import find_expert_matrices
from llmkern.models.heads import find_routers, is_head, shared_weights
from llmkern.models.linears import find_linears, other_function, shape_of, uncalled_linears
from llmkern.models.replace import like, replace_modules
from llmkern.nn import is_packed, packed_class
from llmkern.wire import record_formats

Format = WeightFormat
Rule = Format | Mapping[str, Format | None]
Factory = Callable[[str, nn.Module, Format], nn.Module]
_T = TypeVar("_T")

# Reasons that a refusal gives.
_KINDS = 6


@dataclass
class LinearChoice(Generic[_T]):
    """What a rule does with each linear module of a model.

    Attributes:
        replaced: what the rule gives to every module that it takes, by its full name.
        left: why every other linear module stays as it is, by its full name; modules that hold matrices
            in another way, such as MoE experts, are among them.
        unexpected: names out of `left` that the rule asked for.
    """

    replaced: dict[str, _T] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)

    def _leave(self, name: str, reason: str, *, unexpected: bool) -> None:
        self.left[name] = reason
        if unexpected:
            self.unexpected.append(name)


@dataclass
class PatchReport(LinearChoice[Format]):
    """What `patch` did: `replaced` holds the format of every replaced module, `left` why the others
    stay dense, `unexpected` which of those the rule asked to quantize; `share` how much of the model
    stays as it was."""

    share: str = ""


def patch(
    model: nn.Module, rule: Rule | None = None, *, factory: Factory | None = None
) -> PatchReport:
    """Replace the model's linear layers by packed ones, in place.

    A `QuantFormat` makes an `IntLinear`, a `LutFormat` (NF4, FP4) a `Lut4Linear`.

    The output head, MoE routers and other narrow linears, layers whose weight another module shares (tied
    embeddings) and linears that compute something else than nn.Linear stay as they are. A head or router
    is quantized where a pattern without wildcards names it. What the rule asks for and cannot be had (a
    group size that does not divide K, blocks that split 32 columns, experts held as 3-D parameters) is
    left dense and listed in one warning.

    Args:
        model: any module; a transformers model also gets the `quantization_config` with which its own
            `save_pretrained` writes a loadable checkpoint, where one can hold all its formats: not
            int4 beside NF4 or FP4, nor these two together.
        rule: a format for every layer (4 bits, groups of 128, symmetric by default), or glob patterns
            on full module names with a format each, or None to leave the layers dense. The last
            pattern that matches decides, so write the general ones first.
        factory: makes the replacement from (name, layer, format); round to nearest by default.

    Returns:
        A `PatchReport`.

    Raises:
        ValueError: a pattern with a format matches no linear layer, or every layer would stay dense (it
            says why), none being packed already; a layer holds NaN or Inf (named).
    """
    report = plan_patch(model, rule)
    # A second time there is nothing left to do, and nothing wrong.
    done = [name for name, module in model.named_modules() if is_packed(module)]
    refuse_nothing("rule", [*report.replaced, *done], report.left, "quantize")
    made: dict[int, nn.Module] = {}
    for name, fmt in report.replaced.items():
        linear = model.get_submodule(name)
        if id(linear) not in made:
            made[id(linear)] = like(linear, _make(name, linear, fmt, factory))
        model.set_submodule(name, made[id(linear)])
    if report.replaced:
        record_formats(model)
    report.share = left_share(model, ())
    warn_dense("patch", {name: report.left[name] for name in report.unexpected}, report.share)
    return report


def plan_patch(model: nn.Module, rule: Rule | None = None) -> PatchReport:
    """What `patch` would do with the same arguments; the model is only read."""
    if rule is None or type(rule) in FORMATS:
        rule = {"*": rule or QuantFormat()}  # type: ignore[dict-item]
    rules: Mapping[str, Format | None] = dict(rule)  # type: ignore[arg-type]
    choice: LinearChoice[Format] = choose_linears(model, rules, _misfit)
    return PatchReport(choice.replaced, choice.left, choice.unexpected)


def choose_linears(
    model: nn.Module,
    rules: Mapping[str, _T | None],
    misfit: Callable[[_T, tuple[int, int]], str | None],
) -> LinearChoice[_T]:
    """Which linears of `model` a mapping from glob patterns takes; the model is only read.

    Args:
        model: any module.
        rules: what to give to the layers that a pattern matches, or None to leave them; the last
            pattern that matches decides.
        misfit: called with what a layer would get and its (N, K), returns why it cannot have it, or None.

    Raises:
        ValueError: a pattern that is not None matches no linear layer.
    """
    report: LinearChoice[_T] = LinearChoice()
    linears = find_linears(model)
    for pattern in unmatched([p for p, fmt in rules.items() if fmt is not None], linears):
        raise ValueError(
            f"rule: got the pattern {pattern!r}, which matches no linear layer of "
            f"{type(model).__name__}; layers are named like {next(iter(linears), 'none')!r}"
        )
    shared, routers = shared_weights(model), find_routers(model)
    uncalled = uncalled_linears(model)
    for name, linear in linears.items():
        if id(linear) in uncalled:
            report._leave(name, "nn.MultiheadAttention reads its weight", unexpected=False)
            continue
        winner = winning_pattern(rules, name)
        fmt = None if winner is None else rules[winner]
        reason, unexpected = _reason_to_leave(name, linear, winner, fmt is None, shared, routers)
        if reason is None and fmt is not None:
            reason = misfit(fmt, shape_of(linear))
            unexpected = reason is not None
        if reason is not None or fmt is None:
            report._leave(name, reason or "left dense by the rule", unexpected=unexpected)
            continue
        report.replaced[name] = fmt
    for name, reason in find_expert_matrices(model).items():
        asked = any(
            fmt is not None and fnmatchcase(f"{name}.weight", pattern)
            for pattern, fmt in rules.items()
        )
        report._leave(name, reason, unexpected=asked)
    return report


def unmatched(patterns: Iterable[str], names: Collection[str]) -> list[str]:
    """The patterns that match none of the names."""
    return [p for p in patterns if not any(fnmatchcase(name, p) for name in names)]


def winning_pattern(rules: Mapping[str, object], name: str) -> str | None:
    """The pattern that decides about the module `name`: the last that matches, or None."""
    return next((p for p in reversed(list(rules)) if fnmatchcase(name, p)), None)


def expand_packed(model: nn.Module) -> list[str]:
    """Replace the packed layers of `model` by dense ones of the same values, in place.

    Returns:
        The full names of the layers that were packed.
    """
    packed = {n: m for n, m in model.named_modules() if is_packed(m)}
    places = conv1d_places(model) if packed else {}
    made: dict[nn.Module, nn.Module] = {}
    for name, module in packed.items():
        dense: nn.Module = module.to_linear()
        made[module] = like(module, as_conv1d(dense, places[name]) if name in places else dense)
    replace_modules(model, made)
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        del model.config.quantization_config  # type: ignore[union-attr]
    return list(packed)


def refuse_nothing(
    argument: str, plan: Collection[str], left: Mapping[str, str], what: str
) -> None:
    """Refuse work that would leave every layer as it is.

    Args:
        argument: to be named, "model" or "rule".
        plan: names of the layers that will be changed.
        left: why each other layer will not, by name.
        what: would be done to them, for the message: "quantize".

    Raises:
        ValueError: there is nothing in `plan`; says what was seen, and why it is left.
    """
    if plan:
        return
    kinds = [f"{some(names)}: {reason}" for reason, names in by_reason(left).items()]
    seen = "; ".join(kinds[:_KINDS]) or "no linear layer"
    if len(kinds) > _KINDS:
        seen += f" and {len(kinds) - _KINDS} other reasons"
    raise ValueError(f"{argument}: got no layer to {what}, expected some: {seen}")


def by_reason(left: Mapping[str, str]) -> dict[str, list[str]]:
    """The names of modules that are left by the reason why."""
    found: dict[str, list[str]] = {}
    for name, reason in left.items():
        found.setdefault(reason, []).append(name)
    return found


def some(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def warn_dense(what: str, left: Mapping[str, str], share: str = "") -> None:
    """One warning that lists modules which stay dense against the caller's wish, and why.

    Args:
        what: the verb.
        left: the reason by the module's name.
        share: how much of the model that is, for a last line.
    """
    if left:
        lines = "".join(f"\n  {name}: {reason}" for name, reason in left.items())
        last = f"\n  {share}" if share else ""
        warnings.warn(f"{what}: {len(left)} modules stay dense:{lines}{last}", stacklevel=3)


def _reason_to_leave(
    name: str,
    linear: nn.Module,
    pattern: str | None,
    dense: bool,
    shared: Mapping[int, list[str]],
    routers: Mapping[str, str],
) -> tuple[str | None, bool]:
    """(why a layer is left alone or None, whether the rule asked for it)."""
    if is_packed(linear):
        return "already packed", False
    if pattern is None or dense:
        return (
            "no pattern of the rule matches" if pattern is None else "left dense by the rule",
            False,
        )
    others = [n for n in shared.get(id(linear._parameters.get("weight")), []) if n != name]
    if others:
        return f"shares its weight with {', '.join(others)}", pattern == name
    if pattern != name and (is_head(name) or name in routers):
        kind = "an output head" if is_head(name) else routers[name]
        return f"{kind}, dense unless a pattern names it", False
    other = other_function(linear)
    return other, other is not None


def _misfit(fmt: Format, shape: tuple[int, int]) -> str | None:
    """Why a weight of this shape cannot have the format, or None."""
    odd = packed_class(fmt).refuse(fmt) or fmt.misfit(*shape)
    return None if odd is None else str(odd)


def _make(name: str, linear: nn.Module, fmt: Format, factory: Factory | None) -> nn.Module:
    try:
        if factory is not None:
            return factory(name, linear, fmt)
        return packed_class(fmt).from_format(linear, fmt)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
