"""What packed linears share: file tensors that are repacked for the kernels before they run."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch._guards import TracingContext

from llmkern import _backends
from llmkern.formats import Misfit
from llmkern.nn._packed_weight import PackedWeight

if TYPE_CHECKING:
    from typing_extensions import Self

# Two threads may meet a module's first forward pass together; only one may repack it.
_repacking = threading.Lock()
_LIVING: weakref.WeakSet[PackedLinear] = weakref.WeakSet()


def _tracing() -> bool:
    """Whether torch.compile is tracing in this thread."""
    return TracingContext.try_get() is not None


class FileForm(Protocol):
    """Names and layout that a checkpoint format gives to the tensors of a layer."""

    def tensors(self, layer: Any) -> dict[str, Tensor]:
        """The weight of `layer`, by the names that follow the module's."""

    def canonical(self, layer: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The layer's part of a state_dict with the names of its own; the inverse of `tensors`."""


class PackedLinear(nn.Linear):
    """A linear layer that holds its weight as the tensors of a file or as those of a kernel.

    A subclass registers `_FILE_BUFFERS`, says into which of `_KERNEL_BUFFERS` they are repacked and how
    they come back, and multiplies. One that rules and drivers make from a format names it in `FORMAT`,
    and one that drivers leave in a block tells a journal how it is made again (`stored`, `from_stored`).
    """

    # Class of the formats (`llmkern.formats`) that are held in this module.
    FORMAT: ClassVar[type | None] = None

    # A dense weight stands for it in files: only kernels know of this module.
    WRITTEN_DENSE: ClassVar[bool] = False

    # How the state_dict holds the weight; None is in tensors of the module's own.
    file_form: FileForm | None = None

    _FILE_BUFFERS: ClassVar[tuple[str, ...]]
    # Those of `_FILE_BUFFERS` whose place the kernel's tensors take, by default.
    _REPACKED_BUFFERS: ClassVar[tuple[str, ...]]
    _KERNEL_BUFFERS: ClassVar[tuple[str, ...]]

    # Attributes of the layer's own that a dense linear has no use for.
    _SETTINGS: ClassVar[tuple[str, ...]] = ("_dtype", "_layout", "file_form", "left")

    # Called when the layer becomes dense: whoever has recorded it as packed forgets it.
    left: Callable[[], None] | None = None

    _dtype: torch.dtype
    _layout: str | None

    def _multiply(self, x: Tensor, bias: Tensor | None, layout: str) -> Tensor:
        """y = x @ wᵀ + bias from the tensors of `layout`."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Dense weight [N, K] in `dtype`, by default the layer's."""
        raise NotImplementedError

    @classmethod
    def refuse(cls, fmt: Any) -> Misfit | None:
        """Why this module holds no weight in `fmt`, an instance of `FORMAT`, or None."""
        return None

    @classmethod
    def from_format(cls, linear: nn.Module, fmt: Any) -> PackedLinear:
        """Round a dense linear to the nearest values that `fmt` has.

        Raises:
            ValueError: NaN or Inf in the weight, or a format that does not fit it.
        """
        raise NotImplementedError

    @classmethod
    def from_pattern(cls, linear: nn.Module) -> PackedLinear | None:
        """The module for a linear whose weight has, by its values, the pattern that this one is for.

        Returns:
            None where it has not, and always by default.
        """
        return None

    def stored(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What `from_stored` needs of this layer beside its bias; the layer stays as it is.

        Returns:
            A description, ready for JSON, and tensors by name.

        Raises:
            ValueError: a class of layers that no driver makes.
        """
        raise ValueError(f"layer: got {type(self).__name__}, expected one that a driver makes")

    @classmethod
    def from_stored(
        cls, entry: Mapping[str, Any], tensors: Mapping[str, Tensor], bias: nn.Parameter | None
    ) -> PackedLinear:
        """The layer that `stored` described, with the bias as it is.

        Raises:
            ValueError: tensors that do not fit the description (named).
        """
        raise NotImplementedError

    def _wanted_layout(self) -> str | None:
        """The layout to repack into, or None where the file's tensors serve as they are."""
        raise NotImplementedError

    def _to_layout(self, layout: str) -> Mapping[str, Tensor | None]:
        """The tensors of `_KERNEL_BUFFERS` in `layout`, from the file's."""
        raise NotImplementedError

    def _file_tensors(self) -> dict[str, Tensor | None]:
        """The tensors of `_FILE_BUFFERS`, made anew where a kernel layout has replaced them."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Of the dense weight that this layer stands for."""
        return self._dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Stand-in for the dense weight: shape, dtype and device for free, values on demand."""
        if torch.compiler.is_compiling():
            # Tracers know no stand-ins; a graph drops the values where only their shape or dtype is used.
            self._prepare_for_forward()
            return self.dequantize()
        device = next(t.device for t in self.buffers())
        return PackedWeight(self, (self.out_features, self.in_features), self._dtype, device)

    def __getattr__(self, name: str) -> Any:
        # Of the canonical tensors, those that a kernel layout has replaced are made again.
        value = super().__getattr__(name)
        if value is None and name in self._REPACKED_BUFFERS and self._layout is not None:
            return self._file_tensors()[name]
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # torch would meet a property without a setter, or a name that is taken.
        if name != "weight":
            super().__setattr__(name, value)
        elif not isinstance(value, Tensor):
            raise TypeError(f"weight: got {type(value).__name__}, expected a tensor")
        elif not (isinstance(value, PackedWeight) and value.stands_for(self)):
            self.become_dense(value)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As of any module; a layer that is itself to be trained becomes dense."""
        if requires_grad:
            self.become_dense()
        nn.Module.requires_grad_(self, requires_grad)  # by now, it may be of another class
        return self

    def become_dense(self, weight: Tensor | None = None) -> nn.Parameter:
        """Turn this very module into a dense nn.Linear, since its weight is written to.

        Whoever holds the module, such as the adapter around it, goes on with the linear, and a config
        that named its format no longer does. A warning says so: it takes a dense layer's memory.

        Args:
            weight: float [N, K] to hold from now on, a Parameter as it is; by default the values that
                the layer stands for, in its dtype.

        Returns:
            The linear's weight; it requires no gradient, as before, unless it was given.

        Raises:
            RuntimeError: the layer holds no values (meta device, tracing).
            ValueError: another shape than [N, K].
        """
        held = next(iter(self.buffers()))
        if not self._may_repack(held):
            raise RuntimeError(
                f"weight: got a write while the layer's tensors are {type(held).__name__} on "
                f"{held.device}, expected values: load the model first, and write outside of tracing"
            )
        shape = (self.out_features, self.in_features)
        if weight is not None and tuple(weight.shape) != shape:
            raise ValueError(f"weight: got {list(weight.shape)}, expected {list(shape)}")
        with torch.inference_mode(False), torch.no_grad():
            if weight is None or isinstance(weight, PackedWeight) or weight.is_inference():
                weight = (self.weight if weight is None else weight).clone()
            if not isinstance(weight, nn.Parameter):
                weight = nn.Parameter(weight.detach(), requires_grad=False)
        warnings.warn(
            f"weight: got a write, so this {type(self).__name__} is a dense nn.Linear from now on: "
            "rounding to its format would lose what was written (a merged adapter, an assigned weight); "
            "llmkern.quantize packs it again",
            stacklevel=2,
        )
        self._leave_packed(weight)
        return weight

    def _leave_packed(self, weight: nn.Parameter) -> None:
        """Change class and tensors; hooks, and what others have set on the module, stay."""
        if self.left is not None:
            self.left()
        for name in (*self._FILE_BUFFERS, *self._KERNEL_BUFFERS):
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)
        for name in [n for n in self._SETTINGS if n in vars(self)]:
            delattr(self, name)
        self._parameters["weight"] = weight
        self.__class__ = nn.Linear  # type: ignore[assignment]
        old = vars(self).get("_old_forward")
        if old is not None:  # behind a hook of accelerate's, which has kept the class's method
            self._old_forward = nn.Linear.forward.__get__(self)

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] in x's dtype for x [..., K]; float32, bfloat16 or float16."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x: got {list(x.shape)}, expected [..., {self.in_features}]")
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
        layout = self._prepare_for_forward()
        return self._multiply(x, None if self.bias is None else self.bias.to(x.dtype), layout)

    def to_linear(self) -> nn.Linear:
        """A dense nn.Linear of the same values; its bias is this layer's parameter."""
        linear = nn.Linear(
            self.in_features, self.out_features, bias=False, device="meta", dtype=self._dtype
        )
        linear.weight = nn.Parameter(self.dequantize())
        linear.bias = self.bias
        return linear.train(self.training)

    def _repacked_buffers(self, layout: str) -> tuple[str, ...]:
        """Those of `_FILE_BUFFERS` whose place the kernel's tensors take."""
        return self._REPACKED_BUFFERS

    def _device_layout(self, packed: Tensor) -> str | None:
        """The layout of the kernels that serve the device of `packed`, or None."""
        forced = _backends.forced_backend()
        if forced in (None, "cpu") and _backends.refuse_cpu(packed.device.type) is None:
            return "cpu"
        # The tensor core kernels take 16-bit x; a layer that computes in float32 is better off with
        # the plain kernels, which read the canonical layout.
        tensor_cores = forced in (None, "cuda") and self._dtype != torch.float32
        return "cuda" if tensor_cores and _backends.refuse_cuda(packed.device) is None else None

    @staticmethod
    def _may_repack(packed: Tensor) -> bool:
        """Whether `packed` holds data: neither meta tensors nor a tracer's are repacked for good."""
        return type(packed) in (Tensor, nn.Parameter) and not packed.is_meta

    def prepare(self) -> str:
        """Bring the weight into the layout of the kernel that serves its device, once; the layout."""
        wanted = self._wanted_layout() if self._layout is None else None
        if wanted is not None:
            # Repacked tensors outlive this call: a first pass under inference_mode must not leave
            # tensors behind that a later training pass cannot save.
            with _repacking, torch.inference_mode(False), torch.no_grad():
                if self._layout is None:
                    for name, tensor in self._to_layout(wanted).items():
                        if tensor is not None:
                            self.register_buffer(name, tensor, persistent=False)
                    self._layout = wanted
                    self._buffers.update(dict.fromkeys(self._repacked_buffers(wanted)))
        return self._layout or "canonical"

    def _prepare_for_forward(self) -> str:
        """`prepare`, and of every other layer if a tracer asks for the first.

        A graph is guarded by how its layer is held: traced while its neighbours are not prepared, it
        would serve none of them, and each block would get a graph of its own.
        """
        if self._layout is None and _tracing():
            with _repacking:
                living = list(_LIVING)
            for layer in living:
                # What another layer has against it is said when that one is used.
                with suppress(ValueError):
                    if is_packed(layer) and "_layout" in vars(layer):
                        layer.prepare()
        return self.prepare()

    # Under torch.compile this runs while tracing, and the graph sees its result. This is what
    # torch.compiler.assume_constant_result does, which would import all of Dynamo with llmkern.
    _prepare_for_forward._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        layer = super().__new__(cls)
        with _repacking:
            _LIVING.add(layer)
        return layer

    def restore(self) -> None:
        """Put the canonical tensors back in place of a kernel layout's."""
        if self._layout is not None:
            with _repacking:
                self._buffers.update(self._file_tensors())
                self._layout = None
                for name in self._KERNEL_BUFFERS:
                    self._buffers.pop(name, None)
                    self._non_persistent_buffers_set.discard(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        with self.canonical():
            return self._convert(fn, recurse)

    def _convert(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> PackedLinear:
        """`_apply` to the canonical tensors."""

        def move(t: Tensor) -> Tensor:
            out = fn(t)
            return out if out.dtype == t.dtype else t.to(out.device)

        held = {name: self._buffers[name] for name in self._FILE_BUFFERS}
        device = next(t.device for t in held.values() if t is not None)
        probe = fn(torch.empty(0, dtype=self._dtype, device=device))
        self._buffers.update(dict.fromkeys(self._FILE_BUFFERS))
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            held = {name: None if t is None else move(t) for name, t in held.items()}
        finally:
            self._buffers.update(held)
        if probe.is_floating_point():
            self._dtype = probe.dtype
        return self

    @contextmanager
    def canonical(self) -> Iterator[None]:
        """Hold the canonical tensors meanwhile; a layer that was prepared is so again afterwards."""
        prepared = self._layout is not None
        self.restore()
        try:
            yield
        finally:
            if prepared:
                self.prepare()

    def __getstate__(self) -> dict[str, Any]:
        buffers = {**self._buffers, **self._file_tensors()}
        kernel = {*self._KERNEL_BUFFERS}
        return {
            **self.__dict__,
            "_buffers": {name: t for name, t in buffers.items() if name not in kernel},
            "_non_persistent_buffers_set": self._non_persistent_buffers_set - kernel,
            "_layout": None,
        }

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()
        form = self.file_form
        tensors = self.own_tensors() if form is None else form.tensors(self)
        for name, tensor in tensors.items():
            destination[prefix + name] = tensor

    def own_tensors(self) -> dict[str, Tensor]:
        """What the state_dict holds of the weight, by the names that follow the module's."""
        return {name: t for name, t in self._file_tensors().items() if t is not None}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self.file_form is not None:
            own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
            try:
                own = self.file_form.canonical(self, own)
            except ValueError as error:
                error_msgs.append(f"{prefix}{error}")
                return
            state_dict = {prefix + name: tensor for name, tensor in own.items()}
        prepared, before = self._layout is not None, len(error_msgs)
        self.restore()
        self._load_own(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prepared and len(error_msgs) == before:
            self.prepare()

    def _load_own(self, *args: Any) -> None:
        """`_load_from_state_dict` of tensors of the module's own, while it holds the canonical ones."""
        super()._load_from_state_dict(*args)


def is_packed(module: nn.Module) -> TypeGuard[PackedLinear]:
    """Whether a module is one of the packed linears."""
    return isinstance(module, PackedLinear)
