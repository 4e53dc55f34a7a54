"""transformers' loading hook for bitsandbytes' 4-bit files, whose tensor names no module can hold."""

from __future__ import annotations

import json
import re
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmkern.hf.checkpoint_files import INDEX, WEIGHTS, CheckpointFiles
from llmkern.models.linears import is_linear, shape_of
from llmkern.nn import Lut4Linear

METHOD = "llmkern_bitsandbytes"
_STATES = (".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4")


class _Pending(nn.Module):
    """Stands where a packed layer will: transformers loads its bias, `fill` the rest."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.size = shape_of(linear)[::-1]
        self.register_parameter("bias", getattr(linear, "bias", None))


@register_quantization_config(METHOD)
class TableConfig(QuantizationConfigMixin):
    """Carries the names of the packed layers from `load` to the quantizer; never written."""

    def __init__(self, layers: list[str], quant_method: str = METHOD) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        self.layers = layers


@register_quantizer(METHOD)
class TableQuantizer(HfQuantizer):
    """Takes the weights of the packed layers out of transformers' hands."""

    requires_calibration = True
    quantization_config: TableConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        modules = dict(model.named_modules())
        layers = "|".join(map(re.escape, self.quantization_config.layers))
        ignored = {*(model._keys_to_ignore_on_load_unexpected or ()), rf"^({layers})\.weight(\.|$)"}
        model._keys_to_ignore_on_load_unexpected = ignored
        for name in self.quantization_config.layers:
            module = modules.get(name)
            if module is None or not is_linear(module):
                raise ValueError(
                    f"{name}: got a 4-bit weight for {type(module).__name__}, expected a linear layer"
                )
            model.set_submodule(name, _Pending(module))

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def packed_layers(files: CheckpointFiles) -> list[str]:
    """Names of the modules with a 4-bit weight.

    Raises:
        ValueError: there is none, or the files hold another of bitsandbytes' formats.
    """
    where = f"{files.directory}: quantization_config"
    if not files.config["quantization_config"].get("load_in_4bit"):
        raise ValueError(f"{where}: got bitsandbytes without load_in_4bit, expected NF4 or FP4")
    found = {
        name.removesuffix(state)
        for name in files.tensors
        for state in _STATES
        if name.endswith(state)
    }
    if not found:
        raise ValueError(f"{where}: got no packed weight, expected one with its quant_state")
    return sorted(found)


def fill(model: PreTrainedModel, files: CheckpointFiles) -> None:
    """Put a `Lut4Linear` in the place of every layer that the hook left open.

    Raises:
        ValueError: names the layer whose tensors do not fit, or a model spread over devices.
    """
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise ValueError("device_map: got several devices, expected one: load, then move the model")
    for name, module in list(model.named_modules()):
        if not isinstance(module, _Pending):
            continue
        tensors = {key: t.to(model.device) for key, t in _read(files, name).items()}
        bias = module._parameters["bias"]
        try:
            layer = Lut4Linear.from_bitsandbytes(tensors, bias)
            size = (layer.in_features, layer.out_features)
            if size != module.size:
                raise ValueError(f"weight: got (K, N) = {size}, expected {module.size}")
        except ValueError as error:
            raise ValueError(f"{files.directory}: {name}.{error}") from error
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"{files.directory}: {name}.{key}: got NaN or Inf, expected finite numbers"
                )
        model.set_submodule(name, layer.train(model.training))


def _read(files: CheckpointFiles, layer: str) -> dict[str, Tensor]:
    """The weight's tensors, by the names that follow the module's."""
    names = [n for n in files.tensors if n == f"{layer}.weight" or n.startswith(f"{layer}.weight.")]
    shards = dict.fromkeys(names, WEIGHTS)
    if (files.directory / INDEX).is_file():
        shards = json.loads((files.directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
    found = {}
    for name in names:
        with safe_open(files.directory / shards[name], framework="pt") as file:
            found[name.removeprefix(f"{layer}.")] = file.get_tensor(name)
    return found
