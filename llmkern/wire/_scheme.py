"""Reading compressed-tensors' `quantization_config`: each module's format, or why it cannot be read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from llmkern.formats.int4 import QuantFormat
from llmkern.nn.int_linear import PACKED_BITS

FORMAT = "pack-quantized"


@dataclass(frozen=True)
class Scheme:
    """Which modules are packed, and how.

    Attributes:
        groups: (targets, format) pairs; a target is a module name, a class name, or `re:` and a regex.
        ignore: targets that stay dense whatever the groups say.
    """

    groups: tuple[tuple[tuple[str, ...], QuantFormat], ...]
    ignore: tuple[str, ...]

    def format_of(self, name: str, module: nn.Module) -> QuantFormat | None:
        """Format of a module, or None where it stays dense; names win over regexes over classes."""
        if any(_matches(target, name, module) for target in self.ignore):
            return None
        found = [
            (_rank(target, name), fmt)
            for targets, fmt in self.groups
            for target in targets
            if _matches(target, name, module)
        ]
        return min(found, key=lambda pair: pair[0])[1] if found else None


def read_scheme(config: Mapping[str, Any], where: str) -> Scheme:
    """Parse a compressed-tensors `quantization_config`.

    Args:
        config: the dict of config.json.
        where: what to call its source in errors.

    Raises:
        ValueError: a format or option that llmkern does not read, by its name.
    """
    _expect(config.get("quantization_status", "compressed"), ("compressed",), "status", where)
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        value = config.get(key)
        if value and not (key == "sparsity_config" and value.get("format") in (None, "dense")):
            raise ValueError(f"{where}: {key}: got {_short(value)}, expected none: not supported")
    formats = config.get("format")
    if formats != "mixed-precision":
        _expect(formats, (FORMAT,), "format", where)
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(f"{where}: config_groups: got {groups!r}, expected at least one group")
    return Scheme(
        tuple(
            (tuple(group["targets"]), _read_group(group, f"{where}: {name}"))
            for name, group in groups.items()
        ),
        tuple(config.get("ignore") or ()),
    )


def weights_format(weights: Mapping[str, Any] | None, where: str) -> QuantFormat:
    """Format of compressed-tensors' quantization arguments for a weight.

    Raises:
        ValueError: names the argument that llmkern does not read.
    """
    if weights is None:
        raise ValueError(f"{where}: weights: got none, expected quantization arguments")
    _expect(weights.get("type", "int"), ("int",), "type", where)
    _expect(weights.get("num_bits"), PACKED_BITS, "num_bits", where)
    _expect(weights.get("dynamic", False), (False,), "dynamic", where)
    _expect(weights.get("actorder"), (None, False, "weight", "static"), "actorder", where)
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy is None:
        strategy = "group" if size and size > 0 else "tensor" if size is None else "channel"
    _expect(strategy, ("group", "channel"), "strategy", where)
    return QuantFormat(
        weights["num_bits"],
        size if strategy == "group" else None,
        bool(weights.get("symmetric", True)),
    )


def _read_group(group: Mapping[str, Any], where: str) -> QuantFormat:
    _expect(group.get("format") or FORMAT, (FORMAT,), "format", where)
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise ValueError(
                f"{where}: {key}: got {_short(group[key])}, expected none: quantized activations are "
                "not supported"
            )
    return weights_format(group.get("weights"), where)


def _expect(got: object, wanted: tuple[object, ...], what: str, where: str) -> None:
    value = getattr(got, "value", got)
    # 1 == True: a bit width of 1 is no flag and the other way round.
    if not any(value == w and type(value) is type(w) for w in wanted):
        choices = " or ".join(repr(w) for w in wanted if w is not None)
        raise ValueError(f"{where}: {what}: got {value!r}, expected {choices}: not supported")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _rank(target: str, name: str) -> int:
    return 0 if target == name else 1 if target.startswith("re:") else 2


def _matches(target: str, name: str, module: nn.Module) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target == name or any(cls.__name__ == target for cls in type(module).__mro__)
