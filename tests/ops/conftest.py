"""The `backend` fixture: one run per backend that serves CPU tensors here, and per instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import llmkern
from llmkern._backends import compiled_module


def _names() -> list[str]:
    module, _ = compiled_module("_cpu")
    return ["reference", *(f"cpu-{isa}" for isa in (module.isas() if module else ("missing",)))]


@pytest.fixture(params=_names())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces the backend, and on "cpu" the instruction set, and two threads even on one core."""
    name, _, isa = request.param.partition("-")
    module, why = compiled_module("_cpu")
    if name == "cpu":
        assert module is not None, why
        before, threads = module.isa(), torch.get_num_threads()
        module.set_isa(isa)
        torch.set_num_threads(max(2, threads))
    with llmkern.use_backend(name):
        yield request.param
    if name == "cpu":
        module.set_isa(before)
        torch.set_num_threads(threads)
