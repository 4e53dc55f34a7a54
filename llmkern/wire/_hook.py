"""transformers' loading hook, through which every format puts its layers into a skeleton."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmkern.wire._wire import Reader

# A name of our own that no file ever carries: transformers' loaders for the files' names need other
# packages, and that for compressed-tensors expands the model at its first forward pass.
METHOD = "llmkern"


@register_quantization_config(METHOD)
class ReaderConfig(QuantizationConfigMixin):
    """Carries a format's reader from `load` to the quantizer; never written."""

    def __init__(self, reader: Reader, quant_method: str = METHOD) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        self.reader = reader


@register_quantizer(METHOD)
class ReaderQuantizer(HfQuantizer):
    """Lets the reader prepare the model before transformers fills it."""

    requires_calibration = True
    quantization_config: ReaderConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self.quantization_config.reader.prepare(model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True
