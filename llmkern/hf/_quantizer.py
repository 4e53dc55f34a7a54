"""transformers' loading hook that builds packed layers before the weights arrive."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmkern.formats.int4 import QuantFormat
from llmkern.hf.checkpoint_files import CheckpointFiles
from llmkern.hf.scheme import Scheme
from llmkern.nn import Int4Linear

# A name of our own that no file ever carries: compressed-tensors' own loader, which expands the model
# at its first forward pass and needs that package, is keyed by the file's name.
METHOD = "llmkern"


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """Carries the scheme and the files' headers from `load` to the quantizer; never written."""

    def __init__(self, scheme: Scheme, files: CheckpointFiles, quant_method: str = METHOD) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        self.scheme = scheme
        self.files = files


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Puts `Int4Linear` modules on the meta device in place of the linears that the scheme names."""

    requires_calibration = True
    quantization_config: PackedConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        scheme, files = self.quantization_config.scheme, self.quantization_config.files
        dtypes = {
            name.removesuffix(".weight_scale"): info.torch_dtype
            for name, info in files.tensors.items()
            if name.endswith(".weight_scale")
        }
        # Where transformers renames tensors on the way in, a module's own name is not in the files;
        # all scales of a file have one dtype in practice.
        usual = next(iter(dtypes.values()), None)
        for name, module in list(model.named_modules()):
            fmt = packed_format(scheme, files, name, module)
            if fmt is None:
                continue
            K, N = linear_size(module)
            try:
                layer = Int4Linear(
                    K,
                    N,
                    getattr(module, "bias", None) is not None,
                    fmt,
                    device="meta",
                    dtype=module.weight.dtype,
                )
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            scale_dtype = dtypes.get(name) or usual
            if scale_dtype is not None:
                layer.weight_scale = torch.empty_like(layer.weight_scale, dtype=scale_dtype)
            model.set_submodule(name, layer)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def packed_format(
    scheme: Scheme, files: CheckpointFiles, name: str, module: nn.Module
) -> QuantFormat | None:
    """Format of a module of the skeleton, or None where it is dense or no linear at all."""
    if isinstance(module, nn.Linear):
        return scheme.format_of(name, module)
    if type(module).__name__ == "Conv1D" and f"{name}.weight_packed" in files.tensors:
        # The format knows linears only; a Conv1D is packed as the linear that it computes.
        return scheme.format_of(name, nn.Linear(1, 1, device="meta"))
    return None


def linear_size(module: nn.Module) -> tuple[int, int]:
    """(K, N) of an nn.Linear or a Conv1D."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return int(module.nx), int(module.nf)  # type: ignore[arg-type]
