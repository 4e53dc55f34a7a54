"""All checkpoint formats, and which of them reads a directory or writes a model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from llmkern.models.experts import find_expert_matrices
from llmkern.models.linears import find_linears
from llmkern.nn import PackedLinear, is_packed
from llmkern.wire._wire import Wire
from llmkern.wire.bitsandbytes import Bitsandbytes
from llmkern.wire.checkpoint_files import CheckpointFiles
from llmkern.wire.compressed_tensors import CompressedTensors

# Formats of others that transformers expands to dense weights when it is asked to.
_DEQUANTIZED = ("fp8", "fbgemm_fp8", "mxfp4", "gguf")

# In the order in which they are tried.
WIRES: list[Wire] = [CompressedTensors(), Bitsandbytes()]


def reading_wire(files: CheckpointFiles) -> Wire | None:
    """The format of a checkpoint; None if it is a plain model.

    Raises:
        ValueError: one that llmkern does not read.
    """
    entry = files.config.get("quantization_config")
    if entry is None:
        _refuse_nested(files)
        return None
    if not isinstance(entry, dict):
        raise ValueError(
            f"{files.directory}: quantization_config: got {entry!r}, expected an object"
        )
    for wire in WIRES:
        if wire.reads(files):
            return wire
    raise ValueError(
        f"{files.directory}: quant_method: got {entry.get('quant_method')!r}, expected "
        f"{' or '.join(repr(wire.name) for wire in WIRES)}; {_way_out(entry.get('quant_method'))}"
    )


def _refuse_nested(files: CheckpointFiles) -> None:
    """Refuse a quantized part of a model: of its text decoder, say."""
    for name, part in files.config.items():
        entry = part.get("quantization_config") if isinstance(part, dict) else None
        if isinstance(entry, dict):
            method = entry.get("quant_method")
            raise ValueError(
                f"{files.directory}: {name}.quantization_config: got {method!r}, expected weights that "
                f"are not quantized, or a quantization_config of the whole model; {_way_out(method)}"
            )


def _way_out(method: object) -> str:
    if method in _DEQUANTIZED:
        return (
            "transformers loads it dense with quantization_config=<its config class>(dequantize=True), "
            "and llmkern.save writes that"
        )
    return "give the model that it was made from, in 16 bits"


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """The layers of a model that are not written as dense ones, by full name."""
    return {
        name: module
        for name, module in find_linears(model).items()
        if is_packed(module) and not module.WRITTEN_DENSE
    }


def writing_wire(layers: Mapping[str, PackedLinear], name: str | None = None) -> Wire:
    """The first format that can hold layers; with a name, that one.

    Args:
        layers: by full name; one at least.
        name: of a format.

    Raises:
        ValueError: there is none; says which layers are in the way and what to do.
    """
    wires = [wire for wire in WIRES if name in (None, wire.name)]
    if not wires:
        known = ", ".join(wire.name for wire in WIRES)
        raise ValueError(f"format: got {name!r}, expected one of {known}")
    reasons = []
    for wire in wires:
        if all(wire.holds(layer) for layer in layers.values()):
            reason = wire.refuse(layers)
            if reason is None:
                return wire
            reasons.append(reason)
    raise ValueError(reasons[0] if reasons else _no_common_wire(layers, wires))


def _no_common_wire(layers: Mapping[str, PackedLinear], wires: list[Wire]) -> str:
    firsts: dict[int, str] = {}
    for name, layer in layers.items():
        kinds = [index for index, wire in enumerate(wires) if wire.holds(layer)]
        if not kinds:
            known = " or ".join(wire.name for wire in wires)
            return (
                f"{name}: got {type(layer).__name__}, which {known} does not hold: save the state_dict "
                "with torch.save"
            )
        firsts.setdefault(kinds[0], name)
    one, other = (layers[firsts[index]] for index in sorted(firsts)[:2])
    names = [firsts[index] for index in sorted(firsts)[:2]]
    return (
        f"model: got {names[0]} ({type(one).__name__}) beside {names[1]} ({type(other).__name__}), "
        "expected one kind: no checkpoint format holds both; patch the model with "
        f"{_rule(one)} rules only, or {_rule(other)} rules only, and save it again"
    )


def _rule(layer: PackedLinear) -> str:
    """What a rule says to get such a layer."""
    made = (getattr(kind, "FORMAT", None) for kind in type(layer).__mro__)
    return next((fmt.__name__ for fmt in made if fmt is not None), type(layer).__name__)


def quantization_config(model: nn.Module, wire: Wire) -> dict[str, object]:
    """What config.json says of the model as it is now, written in the format of `wire`."""
    layers = packed_layers(model)
    dense = [name for name in find_linears(model) if name not in layers]
    # A module that holds a stack beside packed linears (Zamba's mamba) is no stack as a whole.
    stacks = [
        name
        for name in find_expert_matrices(model)
        if name and not any(layer.startswith(f"{name}.") for layer in layers)
    ]
    return wire.describe(layers, dense, stacks)


def use_wire(model: nn.Module, wire: Wire | None) -> None:
    """Let the model's state_dict and its config be those of a checkpoint of `wire`.

    transformers' own `save_pretrained` then writes a directory that loads, also after layers have
    become dense (`PackedLinear.become_dense`). Without a format the packed layers have tensors of their
    own, and the config says nothing of them.
    """
    layers, config = packed_layers(model), model.config
    if wire is not None:
        config.quantization_config = quantization_config(model, wire)  # type: ignore[union-attr]
    elif hasattr(config, "quantization_config"):
        del config.quantization_config
    record = None if wire is None else _Recorded(config, wire, set(layers))
    for layer in layers.values():
        names = [name for name, other in layers.items() if other is layer]
        layer.file_form = wire
        layer.left = None if record is None else partial(record.forget, names)


class _Recorded:
    """What a model's config says of its packed layers, kept true while some of them become dense.

    It is copied with the model: `copy.deepcopy` and pickle give the copy's layers the copy's config.
    """

    def __init__(self, config: Any, wire: Wire, names: set[str]) -> None:
        self._config, self._wire, self._names = config, wire, names

    def forget(self, names: list[str]) -> None:
        """Speak of these layers, which are one, as dense."""
        entry = getattr(self._config, "quantization_config", None)
        self._names.difference_update(names)
        if not self._names and entry is not None:
            del self._config.quantization_config
        elif isinstance(entry, dict):
            for name in names:
                self._wire.leave_dense(entry, name)


def record_formats(model: nn.Module) -> None:
    """`use_wire` with the format that can hold the model's packed layers, if there is one.

    A model without a transformers config is left alone.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return
    layers = packed_layers(model)
    try:
        wire = writing_wire(layers) if layers else None
    except ValueError:
        wire = None
    use_wire(model, wire)
