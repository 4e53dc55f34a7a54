"""Models that transformers has loaded with a quantizer of its own, once it has nothing left to do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmkern.models import empty_like, text_config
from llmkern.nn import is_packed
from llmkern.wire import record_formats

_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What others than quantizers keep, too: masks and positions.
_COUNTED = (torch.bool, torch.int64)


def release(model: nn.Module) -> None:
    """Make the model one of ours: transformers' quantizer has nothing left to do."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        forget_quantizer(model)
    record_formats(model)


def forget_quantizer(model: nn.Module) -> None:
    """Take away all that transformers' quantizer has left in a model: Jamba's forward looks at it."""
    model.hf_quantizer.remove_quantization_config(model)  # type: ignore[operator, union-attr]
    for module in model.modules():
        vars(getattr(module, "config", None) or module).pop("_is_quantized", None)


def release_dense(model: nn.Module) -> None:
    """`release` a model that is dense, but for packed layers of ours: expanded from GGUF, say.

    Saving it would otherwise be refused, or write a config that promises packed weights.
    """
    if getattr(model, "hf_quantizer", None) is not None and _is_dense(model):
        release(model)
    decoder = text_config(model)
    if decoder is not model.config and getattr(model, "hf_quantizer", None) is None:
        vars(decoder).pop("quantization_config", None)


def _is_dense(model: nn.Module) -> bool:
    """Whether all but packed layers holds plain numbers under the names of the model's class."""
    ours = {name for name, module in model.named_modules() if is_packed(module)}
    held = {name for name, _ in model.named_parameters()}
    for name, _ in empty_like(model).named_parameters():
        if name not in held and name.rpartition(".")[0] not in ours:
            return False
    others = (module for module in model.modules() if not is_packed(module))
    return all(_is_plain(t) for module in others for t in _own_tensors(module))


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor.data) is Tensor and tensor.dtype in (*_PLAIN, *_COUNTED)
