"""Registration of ops with torch: one schema, one implementation for every device, one fake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern import _backends
from llmkern._dtypes import dtype_name

LIBRARY = torch.library.Library("llmkern", "DEF")  # type: ignore[no-untyped-call]

# Of a compressed weight: Layout of csrc/llmkern.h.
LAYOUTS = ("canonical", "cpu", "cuda")


def kernels(module: str) -> Any:
    """The compiled module llmkern.<module>, which a backend that serves a call has.

    Its functions take the fields of their structs in csrc/llmkern.h by name.
    """
    compiled, _ = _backends.compiled_module(module)
    assert compiled is not None
    return compiled


def pointer(t: Tensor | None) -> int:
    """Address of a tensor's first element for the compiled kernels; 0 for None."""
    return 0 if t is None else t.data_ptr()


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define the op `llmkern::<schema>` and return its callable.

    The op is opaque to torch.compile: it never breaks a graph, and `run` chooses the backend on every
    call from the real arguments.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, _outside_autocast(run, key.lower()), key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"llmkern::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.llmkern, name).default


def _outside_autocast(run: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """`run`, whose dtypes the caller has chosen: autocast must not lower those of torch calls in it."""

    def plain(*args: Any) -> Any:
        if not torch.is_autocast_enabled(device_type):
            return run(*args)
        with torch.autocast(device_type, enabled=False):
            return run(*args)

    return plain


def describe(t: Tensor | None) -> str:
    """dtype, shape and device of an argument, for error messages."""
    if t is None:
        return "None"
    return f"{dtype_name(t.dtype)} {list(t.shape)} on {t.device}"


def check_layout(op: str, layout: str) -> None:
    """Raise the ValueError of an unknown layout."""
    if layout not in LAYOUTS:
        raise ValueError(f"{op}: layout: got {layout!r}, expected one of {', '.join(LAYOUTS)}")


def check_group_size(op: str, group_size: int) -> None:
    """Raise the ValueError of a group size that no kernel reads."""
    if group_size <= 0 or group_size % 32:
        raise ValueError(f"{op}: group_size: got {group_size}, expected a positive multiple of 32")


def expect(condition: bool, op: str, argument: str, got: Tensor | None, wanted: str) -> None:
    """Raise the one-line ValueError of a bad argument unless `condition` holds."""
    if not condition:
        raise ValueError(f"{op}: {argument}: got {describe(got)}, expected {wanted}")
