"""The `weight` of a packed linear: shape and dtype at no cost, values on demand, no lost write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


class _Packed(Protocol):
    """What this asks of a packed linear, which is a plain one after `become_dense`."""

    _parameters: dict[str, nn.Parameter | None]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor: ...
    def become_dense(self, weight: Tensor | None = None) -> nn.Parameter: ...


class _View(NamedTuple):
    """One step from a weight to a view of it: the op, its other arguments, which of its outputs."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: int | None

    def of(self, base: Tensor) -> Tensor:
        result = self.func(base, *self.args, **self.kwargs)
        view: Tensor = result if self.output is None else result[self.output]
        return view


class PackedWeight(Tensor):
    """A stand-in for the dense [N, K] weight that a packed linear does not hold.

    Model code asks `linear.weight` for its dtype, device or shape; these are answered without
    expanding anything. Used as an operand it is dequantized for that operation.

    A write cannot be kept in the codes, and rounding it to them would lose all that is smaller than
    half a step, as an adapter's part mostly is. So the first write, to the weight or through any view
    of it, makes the layer a dense `nn.Linear` (see `PackedLinear.become_dense`) and goes there.
    """

    _linear: _Packed
    _views: tuple[_View, ...]
    # transformers initialises the weight of anything that is an nn.Linear, unless it says this.
    _is_hf_initialized = True

    @staticmethod
    def __new__(
        cls,
        linear: _Packed,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        strides: tuple[int, ...] | None = None,
        views: tuple[_View, ...] = (),
    ) -> PackedWeight:
        weight: PackedWeight = Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=dtype, device=device
        )
        weight._linear, weight._views = linear, views
        return weight

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight({list(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self._values().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._values().clone().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func == Tensor.data.__set__:  # type: ignore[attr-defined]
                return args[0]._assign(args[1])
            if func in _GRAD and (args[1:] or (kwargs.get("requires_grad", True),))[0]:
                raise RuntimeError(
                    "weight: got requires_grad = True, expected False: a packed weight is not trained; "
                    "train an adapter on it, or put layer.to_linear() in the layer's place"
                )
            if func in _RAW:
                raise RuntimeError(
                    f"weight: got {func.__name__}, expected no access to its memory: a packed weight has "
                    "none; take layer.dequantize(), a copy"
                )
            if func in _AS_ARRAY:
                array = func(args[0]._values(), *args[1:], **kwargs)
                if hasattr(array, "flags"):
                    array.flags.writeable = False
                return array
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        schema = func._schema  # type: ignore[attr-defined]
        if schema.is_mutable:
            return _write(func, args, kwargs)
        if func is torch.ops.aten.detach.default and args[0]._held() is None:
            return args[0]._like(args[0], args[0]._views)
        aliases = any(r.alias_info is not None for r in schema.returns)
        if aliases and isinstance(args[0], cls) and args[0]._held() is None:
            return args[0]._viewed(func, args[1:], kwargs)
        args, kwargs = tree_map_only(cls, lambda w: w._values(), (args, kwargs))
        return func(*args, **kwargs)

    def _viewed(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Views of this one that know where they come from: a write to a dense copy would be lost."""
        empty = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta")
        view = func(empty, *args, **kwargs)
        if isinstance(view, Tensor):
            return self._like(view, (*self._views, _View(func, args, kwargs, None)))
        return [
            self._like(each, (*self._views, _View(func, args, kwargs, i)))
            for i, each in enumerate(view)
        ]

    def _like(self, view: Tensor, views: tuple[_View, ...]) -> PackedWeight:
        kind = type(self)
        return kind(self._linear, tuple(view.shape), view.dtype, self.device, view.stride(), views)

    def stands_for(self, linear: _Packed) -> bool:
        """Whether this is the whole weight of `linear`."""
        return self._linear is linear and not self._views

    def _values(self) -> Tensor:
        """What this stands for, to be read."""
        held = self._held()
        return self._replayed(self._linear.dequantize() if held is None else held.detach())

    def _storage(self) -> Tensor:
        """What this stands for, to be written: of the dense weight that the linear has from now on."""
        held = self._held()
        held = self._linear.become_dense() if held is None else held
        return self._hold(self._replayed(held.detach()))

    def _hold(self, storage: Tensor) -> Tensor:
        """Share memory with `storage`, so that a parameter takes it over by `.data = this`."""
        with torch._C.DisableTorchFunctionSubclass():
            self.data = storage
        return storage

    def _held(self) -> nn.Parameter | None:
        """The weight of a linear that has become dense."""
        held = self._linear._parameters.get("weight")
        if isinstance(held, PackedWeight) and held.stands_for(self._linear):
            raise RuntimeError(
                "weight: got the packed weight of a layer whose weight has been replaced since: "
                "its values are gone"
            )
        return held

    def _replayed(self, base: Tensor) -> Tensor:
        for view in self._views:
            base = view.of(base)
        return base

    def _assign(self, value: Tensor) -> None:
        """`weight.data = value`."""
        if self._views:
            raise RuntimeError("weight: got a view to assign .data to, expected the weight itself")
        if isinstance(value, PackedWeight):
            if value.stands_for(self._linear):
                if self._held() is not None:
                    self._storage()  # the end of `weight.data += x`, which has been written
                return
            value = value._values()
        held = self._held()
        if held is None:
            held = self._linear.become_dense(value)
        else:
            held.data = value
        self._hold(held.detach())


_GRAD = (Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
_RAW = (Tensor.__dlpack__, Tensor.share_memory_)
_AS_ARRAY = (Tensor.numpy, Tensor.tolist, Tensor.__array__)


def _write(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an op that writes to packed weights where their values are from now on."""
    written: dict[int, Tensor] = {}

    def operand(argument: Any, value: Any) -> Any:
        writes = argument.alias_info is not None and argument.alias_info.is_write

        def values(weight: PackedWeight) -> Tensor:
            if not writes:
                return weight._values()
            storage = weight._storage()
            written[id(storage)] = weight
            return storage

        return tree_map_only(PackedWeight, values, value)

    arguments = func._schema.arguments  # type: ignore[attr-defined]
    args = tuple(operand(argument, value) for argument, value in zip(arguments, args, strict=False))
    by_name = {argument.name: argument for argument in arguments}
    kwargs = {name: operand(by_name[name], value) for name, value in kwargs.items()}
    result = func(*args, **kwargs)
    return tree_map_only(Tensor, lambda t: written.get(id(t), t), result)
