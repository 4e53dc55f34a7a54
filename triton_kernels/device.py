"""Where a kernel runs: the tensors' GPU, or the interpreter on the CPU."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

# What select_config functions assume without a GPU: the multiprocessors of an H100 or H200.
DEFAULT_SMS = 132


@cache
def _num_sms(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def num_sms(t: torch.Tensor) -> int:
    """Multiprocessors of the GPU that t is on."""
    return _num_sms(t.get_device()) if t.is_cuda else DEFAULT_SMS


def on_device(t: torch.Tensor) -> AbstractContextManager[object]:
    """Makes t's GPU the current one: Triton launches there, wherever the tensors are."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()
