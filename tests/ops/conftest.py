"""The `backend` fixture: one run per backend that serves CPU tensors here, and per instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import llmkern
from llmkern._backends import compiled_module


def _names() -> list[str]:
    module, _ = compiled_module("_cpu")
    return ["reference", *(f"cpu-{isa}" for isa in (module.isas() if module else ("missing",)))]


@pytest.fixture(params=_names())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces the backend, and on "cpu" the instruction set."""
    name, _, isa = request.param.partition("-")
    module, why = compiled_module("_cpu")
    if name == "cpu":
        assert module is not None, why
        before = module.isa()
        module.set_isa(isa)
    with llmkern.use_backend(name):
        yield request.param
    if name == "cpu":
        module.set_isa(before)
