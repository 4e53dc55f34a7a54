"""Sparse24Linear: a linear layer that holds two of every four columns of its weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmkern import _backends
from llmkern._dtypes import FLOATS, dtype_name
from llmkern.formats import sparse24_cpu, sparse24_cuda
from llmkern.formats.sparse24 import check_meta, check_parts, compress, is_pruned24
from llmkern.models.linears import dense_weight, other_function
from llmkern.nn._packed_linear import PackedLinear
from llmkern.ops.dequantize_sparse24 import dequantize_sparse24
from llmkern.ops.sparse24_gemm import sparse24_gemm

_KEEPS_FIRST_TWO = 0x44  # metadata of two groups


class Sparse24Linear(PackedLinear):
    """y = x @ wᵀ + bias with a 2:4 sparse w of floats, of which only the kept values are held.

    The state_dict is that of the `nn.Linear` it stands for: the dense `weight`, made when asked for, and
    `bias`. So files hold a plain dense model whose zeros are the pattern, and anything loads them. A
    dense `weight` that is loaded must be 2:4 sparse.

    `llmkern.prepare`, or the first forward pass, repacks the tensors once into the layout of the kernel
    that serves the device, in place of the canonical ones of `llmkern.formats.sparse24`. `.to(dtype)`
    rounds the values as it would those of a linear; x must have their dtype, and under autocast the
    weight is expanded and cast with it.

    Attributes:
        in_features, out_features: K, a multiple of 8, and N.

    Args:
        in_features: K.
        out_features: N, any.
        bias: whether there is a bias.
        device: of the uninitialised tensors; "meta" for a layer to be loaded with assign=True.
        dtype: of the values and the bias; float32, bfloat16 or float16.

    Raises:
        ValueError: in_features is no multiple of 8, or another dtype.
    """

    WRITTEN_DENSE = True
    _FILE_BUFFERS = ("weight_values", "weight_meta")
    _REPACKED_BUFFERS = ("weight_values", "weight_meta")
    _KERNEL_BUFFERS = ("_values", "_meta")

    weight_values: Tensor
    weight_meta: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._dtype = dtype or torch.get_default_dtype()
        self._layout: str | None = None
        if in_features % 8:
            raise ValueError(f"in_features: got {in_features}, expected a multiple of 8")
        if self._dtype not in FLOATS:
            raise ValueError(f"dtype: got {self._dtype}, expected float32, bfloat16 or float16")
        kw: dict[str, Any] = {"device": device, "dtype": self._dtype}
        self.register_buffer("weight_values", torch.empty(out_features, in_features // 2, **kw))
        meta = torch.full((out_features, in_features // 8), _KEEPS_FIRST_TWO, device=device)
        self.register_buffer("weight_meta", meta.to(torch.uint8))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, **kw))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_linear(cls, linear: nn.Module, mask: Tensor | None = None) -> Sparse24Linear:
        """Hold a linear layer's weight, which is 2:4 sparse, in this form.

        Args:
            linear: nn.Linear, or transformers' Conv1D (weight [K, N]); float32, bfloat16 or float16.
            mask: bool [N, K] of what is kept; by default the weight's non-zeros.

        Returns:
            The sparse layer; it shares `linear`'s bias parameter and training mode.

        Raises:
            ValueError: more than two of some 4 columns are kept (the first row is named), or K is no
                multiple of 8.
        """
        values, meta = compress(dense_weight(linear), mask)
        layer = cls._wrap(values, meta, getattr(linear, "bias", None))
        return layer.train(linear.training)

    @classmethod
    def from_pattern(cls, linear: nn.Module) -> Sparse24Linear | None:
        """The sparse layer of a dense linear that has been pruned to 2:4, or None."""
        weight = linear._parameters.get("weight")
        if type(weight) is not nn.Parameter or other_function(linear) is not None:
            return None
        return cls.from_linear(linear) if is_pruned24(dense_weight(linear)) else None

    @classmethod
    def from_parts(cls, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> Sparse24Linear:
        """Wrap a weight in the canonical layout of `llmkern.formats.sparse24`, without a copy.

        Args:
            values: float32, bfloat16 or float16 [N, K/2].
            meta: uint8 [N, K/8].
            bias: [N] in values' dtype or None; a Parameter is kept as it is.

        Raises:
            ValueError: names the tensor, what it was and what was expected.
        """
        N, _ = check_parts("values", values, meta, 4)
        if not meta.is_meta:
            check_meta(meta)
        for name, tensor, shape in (("meta", meta, meta.shape), ("bias", bias, (N,))):
            if tensor is not None and (tensor.shape != shape or tensor.device != values.device):
                raise ValueError(
                    f"{name}: got {list(tensor.shape)} on {tensor.device}, expected {list(shape)} on "
                    f"{values.device}"
                )
        return cls._wrap(values, meta, bias)

    @classmethod
    def _wrap(cls, values: Tensor, meta: Tensor, bias: Tensor | None) -> Sparse24Linear:
        layer = cls(8 * meta.shape[1], len(meta), bias is not None, "meta", values.dtype)
        layer.weight_values, layer.weight_meta = values.detach().contiguous(), meta.contiguous()
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Dense weight [N, K] in `dtype`, by default the layer's."""
        return dequantize_sparse24(
            *self._operands(), dtype=dtype or self._dtype, layout=self._layout or "canonical"
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, layout={self._layout or 'file'}"
        )

    def _operands(self) -> tuple[Tensor, Tensor]:
        """What the kernels read: (values, meta) in `self._layout`."""
        names = self._FILE_BUFFERS if self._layout is None else self._KERNEL_BUFFERS
        values, meta = (self._buffers[name] for name in names)
        assert values is not None
        assert meta is not None
        return values, meta

    def _multiply(self, x: Tensor, bias: Tensor | None, layout: str) -> Tensor:
        values, meta = self._operands()
        if x.dtype != values.dtype and torch.is_autocast_enabled(x.device.type):
            return nn.functional.linear(x, self.dequantize(x.dtype), bias)
        return sparse24_gemm(x, values, meta, bias, layout=layout)

    def _wanted_layout(self) -> str | None:
        values = self.weight_values
        if not self._may_repack(values):
            return None
        forced = _backends.forced_backend()
        serves_cpu = forced in (None, "cpu") and _backends.refuse_cpu(values.device.type) is None
        if serves_cpu and sparse24_cpu.fits(self.out_features, self.in_features):
            return "cpu"
        tensor_cores = forced in (None, "cuda") and self._dtype != torch.float32
        if tensor_cores and _backends.refuse_cuda(values.device) is None:
            return "cuda"
        return None

    def _to_layout(self, layout: str) -> Mapping[str, Tensor | None]:
        convert = sparse24_cpu.to_cpu_layout if layout == "cpu" else sparse24_cuda.to_cuda_layout
        return dict(zip(self._KERNEL_BUFFERS, convert(*self._operands()), strict=True))

    def _file_tensors(self) -> dict[str, Tensor | None]:
        values, meta = self._operands()
        if self._layout is not None:
            convert = (
                sparse24_cpu.from_cpu_layout
                if self._layout == "cpu"
                else sparse24_cuda.from_cuda_layout
            )
            with torch.inference_mode(False), torch.no_grad():
                values, meta = convert(values, meta)
        return {"weight_values": values, "weight_meta": meta}

    def _convert(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> PackedLinear:
        super()._convert(fn, recurse)
        self.weight_values = self.weight_values.to(self._dtype)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[prefix + "weight"] = self.dequantize()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_own(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {k: v for k, v in state_dict.items() if k.startswith(prefix)}
        weight = own.pop(prefix + "weight", None)
        try:
            parts = None if weight is None else self._compressed(weight)
        except ValueError as error:
            error_msgs.append(prefix + str(error))
            return
        if parts is None:
            parts = (self.weight_values, self.weight_meta)
            if strict:
                missing_keys.append(prefix + "weight")
        own |= zip((prefix + name for name in self._FILE_BUFFERS), parts, strict=True)
        super()._load_own(
            own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _compressed(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A dense weight to be loaded, as the canonical tensors."""
        shape = (self.out_features, self.in_features)
        if tuple(weight.shape) != shape or weight.dtype not in FLOATS:
            raise ValueError(
                f"weight: got {dtype_name(weight.dtype)} {list(weight.shape)}, expected "
                f"a float dtype {list(shape)}"
            )
        if weight.is_meta:
            values = weight.new_empty(shape[0], shape[1] // 2)
            return values, weight.new_empty(shape[0], shape[1] // 8, dtype=torch.uint8)
        try:
            return compress(weight.detach())
        except ValueError as error:
            raise ValueError(f"weight{str(error).removeprefix('w')}") from error
