"""transformers' loading hook that builds packed layers before the weights arrive."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmkern.formats.compressed_tensors import repack_words, word_aligned_width
from llmkern.formats.int4 import QuantFormat
from llmkern.hf.checkpoint_files import CheckpointFiles
from llmkern.hf.scheme import Scheme
from llmkern.models.linears import is_conv1d, shape_of
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

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._word_aligned: list[str] = []

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
            N, K = shape_of(module)
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
            if _is_word_aligned(files, name, layer):
                self._word_aligned.append(name)
                layer.weight_packed = layer.weight_packed.new_empty(
                    N, word_aligned_width(K, fmt.bits)
                )
                if layer.weight_zero_point is not None:
                    words = word_aligned_width(N, fmt.bits)
                    layer.weight_zero_point = layer.weight_scale.new_empty(
                        words, layer.weight_scale.shape[1], dtype=torch.int32
                    )
            model.set_submodule(name, layer)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for name in self._word_aligned:
            layer = model.get_submodule(name)
            assert isinstance(layer, Int4Linear)
            if layer.weight_packed.dtype != torch.int32:
                continue  # `load` refuses it by name
            layer.weight_packed = repack_words(layer.weight_packed, layer.bits, layer.in_features)
            if layer.weight_zero_point is not None:
                rows = layer.weight_zero_point.t()
                rows = repack_words(rows, layer.bits, layer.out_features)
                layer.weight_zero_point = rows.t().contiguous()

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
    if is_conv1d(module) and f"{name}.weight_packed" in files.tensors:
        # The format knows linears only; a Conv1D is packed as the linear that it computes.
        return scheme.format_of(name, nn.Linear(1, 1, device="meta"))
    return None


def _is_word_aligned(files: CheckpointFiles, name: str, layer: Int4Linear) -> bool:
    """Whether the file holds the packing of compressed-tensors before 0.18, told by its width."""
    info = files.tensors.get(f"{name}.weight_packed")
    words = word_aligned_width(layer.in_features, layer.bits)
    old = (layer.out_features, words)
    return info is not None and info.shape == old != tuple(layer.weight_packed.shape)
