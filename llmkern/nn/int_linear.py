"""IntLinear: a linear layer whose weight stays packed integer codes, 2 to 4 bits per element."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llmkern._dtypes import FLOATS, dtype_name
from llmkern.formats import Misfit
from llmkern.formats.int4 import QuantFormat, pack_codes, pack_zeros
from llmkern.formats.int4_cpu import from_cpu_layout, to_cpu_layout
from llmkern.formats.int4_widen import (
    is_wide,
    narrow,
    pad_activations,
    padded_group_size,
    widen,
)
from llmkern.models.linears import dense_weight
from llmkern.nn._packed_linear import PackedLinear
from llmkern.ops import dequantize_int4, round_to_nearest, w4a16_gemm
from llmkern.ops._cuda_layout import pack_int4, unpack_int4

PACKED_BITS = (2, 3, 4)


class IntLinear(PackedLinear):
    """y = x @ wᵀ + bias with w = weight_scale * (codes - zero points), never expanded in memory.

    The state_dict is that of compressed-tensors' `pack-quantized` format for the layer's own bit
    width, whatever the kernels hold meanwhile: `weight_packed`, `weight_scale`, `weight_zero_point`
    (asymmetric only), `weight_shape` and `bias`. `llmkern.prepare`, or the first forward pass, repacks
    these once into the layout of the kernel that serves the device, in place of the file's tensors;
    `state_dict`, `deepcopy` and pickling give the file's tensors back bit for bit.

    `.to(dtype)`, `.half()` and the like change the bias and the dtype that `weight` reports; codes and
    scales keep theirs, so no conversion of a model ever rounds its weights twice. Any float x is
    accepted and y has its dtype; under autocast x is cast as for `nn.Linear`.

    It is an `nn.Linear` to code that looks for one (adapters attach to it as they are), but holds no
    dense weight: see `llmkern.nn.PackedWeight` for what `weight` answers. A write to it, as the merge of
    an adapter is, turns the layer into a dense `nn.Linear`.

    Attributes:
        in_features, out_features: K and N.
        bits: weight bit width, 2, 3 or 4.
        group_size: K-elements per scale; in_features for one scale per row.
        symmetric: no zero points.
        format: the same as a `QuantFormat`, its group_size None where that was asked for.
        activation: "float", or "int8" to round each row of x to 8 bits first (see
            `llmkern.ops.w4a16_gemm`): less exact, faster on long prompts, CPU only. Not saved.

    Args:
        in_features: K, any multiple of the group size.
        out_features: N, any.
        bias: whether there is a bias.
        format: bits, group size and symmetry.
        device: of the uninitialised tensors; "meta" for a layer to be loaded with assign=True.
        dtype: of the bias, the scales and what `weight` reports.

    Raises:
        ValueError: bits not 2, 3 or 4, or a group size that does not divide in_features.
    """

    FORMAT: ClassVar[type | None] = QuantFormat
    activation = "float"
    _FILE_BUFFERS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
    _REPACKED_BUFFERS = ("weight_packed", "weight_scale", "weight_zero_point")
    _KERNEL_BUFFERS: ClassVar[tuple[str, ...]] = ("_qweight", "_scales", "_zeros")
    _SETTINGS = (*PackedLinear._SETTINGS, "format", "bits", "symmetric", "group_size", "activation")

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_shape: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        format: QuantFormat | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.format = format or QuantFormat()
        if self.format.bits not in PACKED_BITS:
            raise ValueError(f"bits: got {self.format.bits}, expected one of {PACKED_BITS}")
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.symmetric = self.format.bits, self.format.symmetric
        self.group_size = self.format.groups(in_features)
        self._dtype = dtype or torch.get_default_dtype()
        self._layout: str | None = None
        groups = in_features // self.group_size
        kw: dict[str, Any] = {"device": device, "dtype": torch.int32}
        words = (-(-in_features * self.bits // 32), -(-out_features * self.bits // 32))
        zero_point = None if self.symmetric else torch.empty(words[1], groups, **kw)
        self.register_buffer("weight_packed", torch.empty(out_features, words[0], **kw))
        self.register_buffer(
            "weight_scale", torch.empty(out_features, groups, device=device, dtype=self._dtype)
        )
        self.register_buffer("weight_zero_point", zero_point)
        self.register_buffer(
            "weight_shape",
            torch.tensor([out_features, in_features], dtype=torch.int64, device=device),
        )
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=self._dtype))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def refuse(cls, fmt: QuantFormat) -> Misfit | None:
        """Why no weight is held in `fmt`, or None."""
        if fmt.bits in PACKED_BITS:
            return None
        return Misfit("bits", fmt.bits, f"is not one of {PACKED_BITS}", f"one of {PACKED_BITS}")

    @classmethod
    def from_format(cls, linear: nn.Module, fmt: QuantFormat) -> IntLinear:
        """`from_linear` with the fields of a format."""
        return cls.from_linear(linear, fmt.bits, fmt.group_size, fmt.symmetric)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        bits: int = 4,
        group_size: int | None = 128,
        symmetric: bool = True,
        *,
        clip_search: bool = False,
        scale_dtype: torch.dtype | None = None,
    ) -> IntLinear:
        """Round a linear layer to nearest.

        Args:
            linear: nn.Linear, or transformers' Conv1D (weight [K, N]); float32, bfloat16 or float16.
            bits: 2, 3 or 4.
            group_size: K-elements per scale, or None for one scale per row.
            symmetric: no zero points.
            clip_search: shrink each group's range to the fraction with the least squared error.
            scale_dtype: of the stored scales; the weight's by default.

        Returns:
            The packed layer; it shares `linear`'s bias parameter and training mode.

        Raises:
            ValueError: NaN or Inf in the weight, or a format that does not fit it.
        """
        w = dense_weight(linear)
        format = QuantFormat(bits, group_size, symmetric)
        rounded = round_to_nearest(w, format, clip_search=clip_search, scale_dtype=scale_dtype)
        layer = cls.from_parts(
            rounded.codes,
            rounded.scales,
            rounded.zeros,
            getattr(linear, "bias", None),
            bits=bits,
            group_size=group_size,
            dtype=w.dtype,
        )
        return layer.train(linear.training)

    @classmethod
    def from_parts(
        cls,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        bits: int = 4,
        group_size: int | None = 128,
        dtype: torch.dtype | None = None,
    ) -> IntLinear:
        """Pack a quantized weight, w = scales * (codes - zeros).

        Args:
            codes: uint8 [N, K] below 2^bits.
            scales: float32, bfloat16 or float16 [N, K/group_size]; stored as given.
            zeros: uint8 [N, K/group_size] below 2^bits, or None for the constant 2^(bits-1).
            bias: [N] or None; a Parameter is kept as it is.
            bits: 2, 3 or 4.
            group_size: K-elements per scale, or None for one scale per row.
            dtype: that `weight` reports; the bias's by default, else the scales'.

        Raises:
            ValueError: names the argument, what it was and what was expected.
        """
        if codes.dtype != torch.uint8 or codes.dim() != 2:
            raise ValueError(f"codes: got {codes.dtype} {list(codes.shape)}, expected uint8 [N, K]")
        return cls.from_packed(
            pack_codes(codes, bits),
            scales,
            None if zeros is None else pack_zeros(zeros, bits),
            bias,
            in_features=codes.shape[1],
            format=QuantFormat(bits, group_size, zeros is None),
            dtype=dtype,
        )

    @classmethod
    def from_packed(
        cls,
        weight_packed: Tensor,
        weight_scale: Tensor,
        weight_zero_point: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        in_features: int,
        format: QuantFormat,
        dtype: torch.dtype | None = None,
    ) -> IntLinear:
        """Wrap tensors of the canonical layout, as compressed-tensors stores them, without a copy.

        Args:
            weight_packed: int32 [N, ceil(K * bits / 32)].
            weight_scale: float32, bfloat16 or float16 [N, K/group_size].
            weight_zero_point: int32 [ceil(N * bits / 32), K/group_size], asymmetric only.
            bias: [N] or None; a Parameter is kept as it is.
            in_features: K.
            format: bits, group size and symmetry.
            dtype: that `weight` reports; the bias's by default, else the scales'.

        Raises:
            ValueError: names the tensor, what it was and what was expected.
        """
        dtype = dtype or (weight_scale if bias is None else bias).dtype
        layer = cls(in_features, len(weight_packed), bias is not None, format, "meta", dtype)
        tensors = {
            "weight_packed": weight_packed,
            "weight_scale": weight_scale,
            "weight_zero_point": weight_zero_point,
            "bias": bias,
        }
        if (weight_zero_point is None) != layer.symmetric:
            got, wanted = ("none", "some") if weight_zero_point is None else ("some", "none")
            raise ValueError(
                f"weight_zero_point: got {got}, expected {wanted} (symmetric = {layer.symmetric})"
            )
        if not weight_scale.is_meta and not bool(torch.isfinite(weight_scale).all()):
            raise ValueError("weight_scale: got NaN or Inf, expected finite scales")
        problems = [layer.problem(k, v) for k, v in tensors.items() if v is not None]
        problems += [
            f"{name}: got a tensor on {t.device}, expected {weight_packed.device}"
            for name, t in tensors.items()
            if t is not None and t.device != weight_packed.device
        ]
        for problem in problems:
            if problem:
                raise ValueError(problem)
        for name in cls._REPACKED_BUFFERS:
            tensor = tensors[name]
            layer._buffers[name] = None if tensor is None else tensor.detach().contiguous()
        layer.weight_shape = torch.tensor(
            [layer.out_features, in_features], device=weight_packed.device
        )
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    def stored(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What `from_stored` needs of this layer beside its bias."""
        entry = {"in_features": self.in_features, "format": self.format.to_dict()}
        return entry, {k: t for k, t in self._file_tensors().items() if t is not None}

    @classmethod
    def from_stored(
        cls, entry: Mapping[str, Any], tensors: Mapping[str, Tensor], bias: nn.Parameter | None
    ) -> IntLinear:
        """The layer that `stored` described."""
        return cls.from_packed(
            tensors["weight_packed"],
            tensors["weight_scale"],
            tensors.get("weight_zero_point"),
            bias,
            in_features=entry["in_features"],
            format=QuantFormat.from_dict(entry["format"]),
            dtype=entry["dtype"],
        )

    def _multiply(self, x: Tensor, bias: Tensor | None, layout: str) -> Tensor:
        qweight, scales, zeros = self._operands()
        return w4a16_gemm(
            pad_activations(x, self.group_size),
            qweight,
            scales,
            zeros,
            bias,
            group_size=padded_group_size(self.group_size),
            layout=layout,
            activation=self.activation,
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Dense weight [N, K] in `dtype`, by default the layer's."""
        qweight, scales, zeros = self._operands()
        padded = padded_group_size(self.group_size)
        w = dequantize_int4(
            qweight,
            scales,
            zeros,
            group_size=padded,
            dtype=dtype or self._dtype,
            layout=self._layout or "canonical",
        )
        return w.view(self.out_features, -1, padded)[..., : self.group_size].reshape(
            self.out_features, self.in_features
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.bits}, group_size={self.group_size}, "
            f"symmetric={self.symmetric}, layout={self._layout or 'file'}"
        )

    def _operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the kernels read: (qweight, scales, zeros) in `self._layout`."""
        if self._layout is not None:
            qweight, scales, zeros = (self._buffers.get(name) for name in self._KERNEL_BUFFERS)
            assert qweight is not None
            assert scales is not None
            return qweight, scales, zeros
        packed, zeros = self.weight_packed, self.weight_zero_point
        if not is_wide(self.bits, self.group_size):
            packed, zeros = widen(packed, zeros, self.bits, self.group_size, self._shape)
        return packed, self.weight_scale, zeros

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _wanted_layout(self) -> str | None:
        packed = self.weight_packed
        if not self._may_repack(packed):
            return None
        if layout := self._device_layout(packed):
            return layout
        return None if is_wide(self.bits, self.group_size) else "canonical"

    def _to_layout(self, layout: str) -> Mapping[str, Tensor | None]:
        operands = self._operands()
        if layout != "canonical":
            convert = to_cpu_layout if layout == "cpu" else pack_int4
            operands = convert(*operands, padded_group_size(self.group_size))
        return dict(zip(self._KERNEL_BUFFERS, operands, strict=True))

    def _file_tensors(self) -> dict[str, Tensor | None]:
        if self._layout is None:
            return {name: self._buffers[name] for name in self._FILE_BUFFERS}
        with torch.inference_mode(False), torch.no_grad():
            qweight, scales, zeros = self._operands()
            if self._layout != "canonical":
                padded = padded_group_size(self.group_size)
                convert = from_cpu_layout if self._layout == "cpu" else unpack_int4
                qweight, scales, zeros = convert(qweight, scales, zeros, padded)
            if not is_wide(self.bits, self.group_size):
                qweight, zeros = narrow(qweight, zeros, self.bits, self.group_size, self._shape)
        return dict(
            zip(self._FILE_BUFFERS, (qweight, scales, zeros, self.weight_shape), strict=True)
        )

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
        problems = []
        for name in (*self._FILE_BUFFERS, "bias"):
            tensor = state_dict.get(prefix + name)
            if isinstance(tensor, Tensor) and getattr(self, name) is not None:
                problem = self.problem(name, tensor)
                problems += [prefix + problem] if problem else []
        if problems:
            error_msgs.extend(problems)
            return
        scale = state_dict.get(prefix + "weight_scale")
        if isinstance(scale, Tensor) and scale.dtype != self.weight_scale.dtype:
            self.weight_scale = torch.empty_like(self.weight_scale, dtype=scale.dtype)
        super()._load_own(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def problem(self, name: str, tensor: Tensor) -> str | None:
        """Why `tensor` cannot be this layer's `name`, or None."""
        N, K = self._shape
        groups = K // self.group_size
        wanted: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {
            "weight_packed": ((torch.int32,), (N, -(-K * self.bits // 32))),
            "weight_scale": (FLOATS, (N, groups)),
            "weight_zero_point": ((torch.int32,), (-(-N * self.bits // 32), groups)),
            "weight_shape": ((torch.int64,), (2,)),
            "bias": (FLOATS, (N,)),
        }
        dtypes, shape = wanted[name]
        if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
            kinds = " or ".join(map(dtype_name, dtypes))
            return (
                f"{name}: got {dtype_name(tensor.dtype)} {list(tensor.shape)}, "
                f"expected {kinds} {list(shape)} (N = {N}, K = {K}, bits = {self.bits}, group_size = "
                f"{self.group_size})"
            )
        if name == "weight_shape" and not tensor.is_meta and tensor.tolist() != [N, K]:
            return f"weight_shape: got {tensor.tolist()}, expected {[N, K]}"
        return None


# Its name while 4 bits were all that it held.
Int4Linear = IntLinear
