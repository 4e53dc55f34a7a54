"""Bytes of a model's weights, and its tokens per second."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.models import cache_name
from llmkern.nn import is_packed

_SPEED_RUNS = 5
_DECODE_PROMPT = 32


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights as they are held, packed ones packed; shared memory counts once.

    Counted are the parameters and buffers of every module that has something to save, which takes in
    kernel layouts and leaves out tables that are computed (rotary frequencies, masks).
    """
    storages = {}
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))
        held = [*module.parameters(recurse=False), *buffers.values()]
        computed = (
            len(held) == len(buffers) and buffers.keys() <= module._non_persistent_buffers_set
        )
        if computed and not is_packed(module):
            continue
        for tensor in held:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def speeds(model: nn.Module, window: Tensor) -> tuple[float, float]:
    """Tokens per second of prefill and of greedy decoding, batch 1, medians after a warm-up.

    Args:
        model: a causal language model in evaluation mode.
        window: int64 [1, T] of tokens.
    """
    window = window.to(next(model.parameters()).device)
    keep: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        keep["logits_to_keep"] = 1  # as generation does

    def prefill(tokens: Tensor) -> Any:
        return model(input_ids=tokens, use_cache=True, **keep)

    prefill(window)
    seconds = [_timed(lambda: prefill(window), window.device) for _ in range(_SPEED_RUNS)]
    prefill_rate = window.shape[1] / median(seconds)

    prompt = window[:, : max(1, min(_DECODE_PROMPT, window.shape[1] // 2))]
    output = prefill(prompt)
    name = cache_name(model)
    steps = []
    # Prompt and steps fit the window, and so the model's context.
    for _ in range(min(64, window.shape[1] - prompt.shape[1])):
        token = output.logits[:, -1:].argmax(-1)
        cache = {name: getattr(output, name)}

        def decode(token: Tensor = token, cache: dict[str, Any] = cache) -> None:
            nonlocal output
            output = model(input_ids=token, use_cache=True, **cache)

        steps.append(_timed(decode, window.device))
    return prefill_rate, 1 / median(steps[len(steps) // 8 :])


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
