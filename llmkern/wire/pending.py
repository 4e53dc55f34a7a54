"""Packed layers whose tensors' names in the files no module can hold: read past transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmkern.models.linears import is_linear, shape_of
from llmkern.nn import PackedLinear
from llmkern.wire.checkpoint_files import CheckpointFiles
from llmkern.wire.conversions import module_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Pending(nn.Module):
    """Stands where a packed layer will: transformers loads its bias, `fill_pending` the rest."""

    def __init__(self, linear: nn.Module, written: str) -> None:
        super().__init__()
        self.written = written  # its name in the files
        self.shape = shape_of(linear)
        self.register_parameter("bias", getattr(linear, "bias", None))
        # Some models' `_init_weights` looks at it (GPT-2); no parameter, or it would count as missing.
        self.weight = torch.empty(self.shape, device="meta")


def leave_pending(
    model: PreTrainedModel, layers: Sequence[str], names: Sequence[str], what: str
) -> None:
    """Take layers out of transformers' hands.

    Args:
        model: the skeleton.
        layers: full names in the files.
        names: of their tensors in the files, by what follows the module's name: "weight" stands for
            "weight.absmax", too.
        what: the files have there, for messages: "a 4-bit weight".

    Raises:
        ValueError: there is no linear by one of the names.
    """
    modules, renamed = dict(model.named_modules()), module_names(model, layers)
    either, tensors = (
        "|".join(map(re.escape, part)) for part in ({*layers, *renamed.values()}, names)
    )
    ignored = {
        *(model._keys_to_ignore_on_load_unexpected or ()),
        rf"^({either})\.({tensors})(\.|$)",
    }
    model._keys_to_ignore_on_load_unexpected = ignored
    for written, name in renamed.items():
        module = modules.get(name)
        if module is None or not is_linear(module):
            there = "no module of that name" if module is None else type(module).__name__
            raise ValueError(f"{written}: got {what} for {there}, expected a linear layer")
        model.set_submodule(name, Pending(module, written))


def fill_pending(
    model: PreTrainedModel,
    files: CheckpointFiles,
    names: Sequence[str],
    make: Callable[[Mapping[str, Tensor], nn.Parameter | None], PackedLinear],
) -> None:
    """Put a packed layer in the place of every one that was left pending.

    Args:
        model: loaded, but for these.
        files: that it comes from.
        names: as for `leave_pending`.
        make: the layer from its tensors, by what follows the module's name, and its bias.

    Raises:
        ValueError: names the layer whose tensors do not fit, or a model spread over devices.
    """
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise ValueError("device_map: got several devices, expected one: load, then move the model")
    for name, module in list(model.named_modules()):
        if not isinstance(module, Pending):
            continue
        found = files.read(module.written, names)
        tensors = {key: t.to(model.device) for key, t in found.items()}
        try:
            layer = make(tensors, module._parameters["bias"])
            size = (layer.in_features, layer.out_features)
            if size != module.shape[::-1]:
                raise ValueError(f"weight: got (K, N) = {size}, expected {module.shape[::-1]}")
        except ValueError as error:
            raise ValueError(f"{files.directory}: {name}.{error}") from error
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"{files.directory}: {name}.{key}: got NaN or Inf, expected finite numbers"
                )
        model.set_submodule(name, layer.train(model.training))
