"""The dtype that a model is run in while it is calibrated and measured, which need not be its own.

Processors without instructions for them multiply 16-bit numbers several times slower than float32, in
which every one of them can be held exactly: there a block or a model runs in float32, and its weights are
back in their own dtype, unchanged, afterwards.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from llmkern._dtypes import FLOATS_BY_NAME, dtype_name

AUTO = "auto"
_HALVES = (torch.bfloat16, torch.float16)


def compute_dtype(model: nn.Module, asked: str = AUTO) -> torch.dtype:
    """The dtype to run `model` in.

    Args:
        model: a model, or a part of it.
        asked: "auto": its own, but float32 in place of 16 bits that its processor multiplies slowly; or
            the name of its own, or "float32".

    Raises:
        ValueError: another dtype than these.
    """
    own, device = _own(model)
    return chosen_dtype(own, device, asked)


def chosen_dtype(own: torch.dtype, device: str, asked: str = AUTO) -> torch.dtype:
    """`compute_dtype` of a model that is not there yet, by its dtype and its kind of device."""
    if asked == AUTO:
        slow = own in _HALVES and device == "cpu" and not _is_native(own)
        return torch.float32 if slow else own
    wanted = FLOATS_BY_NAME.get(asked)
    if wanted is None or wanted not in (own, torch.float32):
        names = dict.fromkeys((AUTO, "float32", dtype_name(own)))
        raise ValueError(f"compute_dtype: got {asked!r}, expected one of {', '.join(names)}")
    return wanted


def whole_dtypes(models: Sequence[nn.Module], asked: str = "auto") -> list[torch.dtype]:
    """The dtypes to run whole models in beside one another; see `compute_dtype`.

    With "auto" it is their own where memory is short: the copies may take half of what is free.
    """
    import psutil

    dtypes = [compute_dtype(model, asked) for model in models]
    if asked == "auto":
        halves = sum(p.numel() for m in models for p in m.parameters() if p.dtype.itemsize == 2)
        if 4 * halves > psutil.virtual_memory().available // 2:
            return [_own(model)[0] for model in models]
    return dtypes


def compute_note(model: nn.Module, dtype: torch.dtype) -> str | None:
    """A sentence that says so where `dtype` is not the model's own."""
    own, _ = _own(model)
    if own == dtype:
        return None
    return (
        f"computed in {dtype_name(dtype)}: this processor multiplies {dtype_name(own)} more slowly"
    )


@contextmanager
def computing_in(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Run `module` in float32, if that is the dtype, though its weights are of 16 bits.

    Inside, parameters and buffers hold float32 copies, which may be read and differentiated; what is
    written into them is lost, because the tensors of before come back at the end. Layers that hold packed
    codes take float32 as it is.
    """
    held: list[tuple[Tensor, Tensor]] = []
    try:
        if dtype == torch.float32:
            for tensor in _halves(module):
                held.append((tensor, tensor.data))
                tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in held:
            tensor.data = data


def cast_floats(value: Any, dtype: torch.dtype) -> Any:
    """Arguments of a call with their 16-bit tensors in `dtype`, in lists, tuples and dicts too."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.dtype in _HALVES else value
    if type(value) in (list, tuple):
        return type(value)(cast_floats(entry, dtype) for entry in value)
    if type(value) is dict:
        return {key: cast_floats(entry, dtype) for key, entry in value.items()}
    return value


def _own(model: nn.Module) -> tuple[torch.dtype, str]:
    """Dtype and kind of device of the first parameter that is a float."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.dtype, parameter.device.type
    return torch.get_default_dtype(), "cpu"


def _halves(module: nn.Module) -> Iterator[Tensor]:
    for part in module.modules():
        own: list[Tensor] = list(part.parameters(recurse=False))
        if not isinstance(part, nn.Linear):  # a packed one has buffers; its kernels take any dtype
            own += part.buffers(recurse=False)
        yield from (tensor for tensor in own if tensor.dtype in _HALVES)


@cache
def _is_native(dtype: torch.dtype) -> bool:
    """Whether this processor, as far as torch uses it, has instructions for products of this dtype."""
    if platform.machine() in ("x86_64", "AMD64"):
        if torch.backends.cpu.get_cpu_capability() != "AVX512":
            return False
        name = "_is_avx512_bf16_supported" if dtype == torch.bfloat16 else "_is_amx_fp16_supported"
        return bool(getattr(torch.cpu, name, bool)())
    known = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)
    return dtype == torch.bfloat16 and bool(known())
