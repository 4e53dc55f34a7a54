"""The `weight` of a packed linear: its shape, dtype and device at no cost, its values on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class _Dequantizable(Protocol):
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor: ...


class PackedWeight(Tensor):
    """A stand-in for the dense [N, K] weight that a packed linear does not hold.

    Model code asks `linear.weight` for its dtype, device or shape; these are answered without
    expanding anything. Used as an operand it is dequantized for that operation. It cannot be written:
    a write would go to a temporary copy and be lost.
    """

    _linear: _Dequantizable
    # transformers initialises the weight of anything that is an nn.Linear, unless it says this.
    _is_hf_initialized = True

    @staticmethod
    def __new__(
        cls,
        linear: _Dequantizable,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> PackedWeight:
        weight: PackedWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        weight._linear = linear
        return weight

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight({list(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func._schema.is_mutable:  # type: ignore[attr-defined]
            raise RuntimeError(
                f"weight: got a write ({func}), expected reads only: a packed weight cannot be changed "
                "in place; take to_linear() for a dense layer"
            )
        # `weight.data` and `weight.detach()` must stay this class, or a write to them would pass.
        if func is torch.ops.aten.detach.default:
            own = args[0]
            return cls(own._linear, tuple(own.shape), own.dtype, own.device)
        dense = tree_map_only(cls, lambda w: w._linear.dequantize(w.dtype), (args, kwargs or {}))
        return func(*dense[0], **dense[1])
