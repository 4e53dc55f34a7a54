"""Replace the linear layers of a model by packed ones, by rule."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from llmkern.formats.compressed_tensors import describe_formats
from llmkern.formats.int4 import QuantFormat
from llmkern.nn.int4_linear import BITS, Int4Linear

Rule = QuantFormat | Mapping[str, QuantFormat | None]
Factory = Callable[[str, nn.Module, QuantFormat], nn.Module]

# Last components of the names of layers that decide which expert or class wins: tiny, and sensitive.
_HEADS = ("lm_head", "embed_out", "output_layer", "score", "classifier")
_ROUTERS = ("gate", "router", "shared_expert_gate")


@dataclass
class PatchReport:
    """What `patch` did.

    Attributes:
        replaced: format of every replaced module, by its full name.
        left: why every other linear module stays dense, by its full name; modules that hold matrices
            in another way, such as MoE experts, are among them.
        unexpected: names out of `left` that the rule asked to quantize.
    """

    replaced: dict[str, QuantFormat] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)

    def _leave(self, name: str, reason: str, *, unexpected: bool) -> None:
        self.left[name] = reason
        if unexpected:
            self.unexpected.append(name)


def patch(
    model: nn.Module, rule: Rule | None = None, *, factory: Factory | None = None
) -> PatchReport:
    """Replace the model's linear layers by `Int4Linear`, in place.

    The output head, MoE routers, layers whose weight another module shares (tied embeddings) and
    modules of any other class stay as they are. A head or router is quantized where a pattern
    without wildcards names it. What the rule asks for and cannot be had (a group size that does not
    divide K, experts held as 3-D parameters) is left dense and listed in one warning.

    Args:
        model: any module; a transformers model also gets the `quantization_config` with which its own
            `save_pretrained` writes a loadable checkpoint.
        rule: a format for every layer (4 bits, groups of 128, symmetric by default), or glob patterns
            on full module names with a format each, or None to leave the layers dense. The last
            pattern that matches decides, so write the general ones first.
        factory: makes the replacement from (name, layer, format); round to nearest by default.

    Returns:
        A `PatchReport`.

    Raises:
        ValueError: a pattern with a format matches no linear layer; a layer holds NaN or Inf (named).
    """
    report = plan_patch(model, rule)
    made: dict[int, nn.Module] = {}
    for name, fmt in report.replaced.items():
        linear = model.get_submodule(name)
        if id(linear) not in made:
            made[id(linear)] = _make(name, linear, fmt, factory)
        model.set_submodule(name, made[id(linear)])
    if report.replaced:
        record_formats(model)
    warn_dense("patch", {name: report.left[name] for name in report.unexpected})
    return report


def plan_patch(model: nn.Module, rule: Rule | None = None) -> PatchReport:
    """What `patch` would do with the same arguments; the model is only read."""
    if rule is None or isinstance(rule, QuantFormat):
        rule = {"*": rule or QuantFormat()}
    rules = dict(rule)
    report = PatchReport()
    linears = find_linears(model)
    for pattern, fmt in rules.items():
        if fmt is not None and not any(fnmatchcase(name, pattern) for name in linears):
            raise ValueError(
                f"rule: got the pattern {pattern!r}, which matches no linear layer of "
                f"{type(model).__name__}; layers are named like {next(iter(linears), 'none')!r}"
            )
    shared = _shared_weights(model)
    for name, linear in linears.items():
        winner = winning_pattern(rules, name)
        fmt = None if winner is None else rules[winner]
        reason, unexpected = _reason_to_leave(name, linear, winner, fmt, shared)
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


def winning_pattern(rules: Mapping[str, QuantFormat | None], name: str) -> str | None:
    """The pattern that decides about the module `name`: the last that matches, or None."""
    return next((p for p in reversed(list(rules)) if fnmatchcase(name, p)), None)


def find_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that multiplies by a dense matrix, by its full name: linears and Conv1D."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) or _is_conv1d(module)
    }


def find_expert_matrices(model: nn.Module) -> dict[str, str]:
    """Modules that hold a stack of matrices in one 3-D parameter, and how it looks.

    transformers keeps MoE experts this way; convolutions have such weights too and are not listed.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            continue
        stacks = [
            f"{n} {list(p.shape)}"
            for n, p in module.named_parameters(recurse=False)
            if p.dim() == 3
        ]
        if stacks:
            found[name] = f"its matrices are held in 3-D parameters ({', '.join(stacks)})"
    return found


def record_formats(model: nn.Module) -> None:
    """Write the formats of the model's `Int4Linear` modules into its config, as checkpoints do.

    transformers' own `save_pretrained` then writes a directory that loads. A model without a
    transformers config is left alone.
    """
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        config.quantization_config = quantization_config(model)


def quantization_config(model: nn.Module) -> dict[str, object]:
    """compressed-tensors' `quantization_config` of the model as it is now."""
    formats, dense = {}, []
    for name, module in find_linears(model).items():
        if isinstance(module, Int4Linear):
            formats[name] = module.format
        else:
            dense.append(name)
    # Readers that unfuse the experts look each one up by its own name.
    dense += [f"re:{name}.*" for name in find_expert_matrices(model)]
    return describe_formats(formats, dense)


def warn_dense(what: str, left: Mapping[str, str]) -> None:
    """One warning that lists modules which stay dense against the caller's wish, and why."""
    if left:
        lines = "".join(f"\n  {name}: {reason}" for name, reason in left.items())
        warnings.warn(f"{what}: {len(left)} modules stay dense:{lines}", stacklevel=3)


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2), recognised without importing transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _shared_weights(model: nn.Module) -> dict[int, list[str]]:
    """Names under which each weight parameter is reached by different modules, where there are two."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            users.setdefault(id(weight), []).append(name)
    return {key: names for key, names in users.items() if len(names) > 1}


def _reason_to_leave(
    name: str,
    linear: nn.Module,
    pattern: str | None,
    fmt: QuantFormat | None,
    shared: Mapping[int, list[str]],
) -> tuple[str | None, bool]:
    """(why a layer is left alone or None, whether the rule asked for it)."""
    if isinstance(linear, Int4Linear):
        return "already packed", False
    if pattern is None or fmt is None:
        return (
            "no pattern of the rule matches" if pattern is None else "left dense by the rule",
            False,
        )
    others = [n for n in shared.get(id(linear._parameters.get("weight")), []) if n != name]
    if others:
        return f"shares its weight with {', '.join(others)}", pattern == name
    last = name.rsplit(".", 1)[-1]
    if pattern != name and last in _HEADS + _ROUTERS:
        kind = "an output head" if last in _HEADS else "a router"
        return f"{kind}, dense unless a pattern names it", False
    if type(linear) is not nn.Linear and not _is_conv1d(linear):
        return f"of class {type(linear).__name__}, which is not a plain nn.Linear", True
    if fmt.bits not in BITS:
        return f"bits = {fmt.bits} is not one of {BITS}", True
    K = linear.weight.shape[0 if _is_conv1d(linear) else 1]  # type: ignore[index]
    if fmt.group_size is not None and K % fmt.group_size:
        return f"group_size = {fmt.group_size} does not divide its K = {K}", True
    return None, False


def _make(name: str, linear: nn.Module, fmt: QuantFormat, factory: Factory | None) -> nn.Module:
    try:
        if factory is not None:
            return factory(name, linear, fmt)
        return Int4Linear.from_linear(linear, fmt.bits, fmt.group_size, fmt.symmetric)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
