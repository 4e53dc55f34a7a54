"""Lut4Linear: a linear layer whose weight stays 4-bit codes into a book of 16 values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llmkern._dtypes import FLOATS, dtype_name
from llmkern.formats.bitsandbytes import from_bitsandbytes, to_bitsandbytes
from llmkern.formats.int4 import pack_codes
from llmkern.formats.lut4 import (
    BLOCK_SIZES,
    CODEBOOKS,
    Lut4Weight,
    LutFormat,
    check_codebook,
    codebook_name,
    group_scales,
    group_size_of,
    quantize_blockwise,
)
from llmkern.formats.lut4_cpu import from_cpu_layout, to_cpu_layout
from llmkern.models.linears import dense_weight
from llmkern.nn._packed_linear import PackedLinear
from llmkern.ops._cuda_layout import pack_lut4, unpack_lut4
from llmkern.ops.dequantize_lut4 import dequantize_lut4
from llmkern.ops.lut4_gemm import lut4_gemm


class Lut4Linear(PackedLinear):
    """y = x @ wᵀ + bias with w = weight_scale * weight_codebook[codes], never expanded in memory.

    With the NF4 or FP4 table for the whole weight, the state_dict is bitsandbytes' own (`weight`,
    `weight.absmax`, `weight.quant_map`, `weight.quant_state.bitsandbytes__nf4`, `bias`), so that its
    files are read by transformers with bitsandbytes; nested scales of such a file are decoded when
    loaded and saved plain. With any other book it is `weight_packed`, `weight_codebook` and
    `weight_scale` (if there are scales), in the layout of `llmkern.formats.lut4`. Either is loaded.

    As in `IntLinear`, `llmkern.prepare` or the first pass repacks the weight for the kernels,
    `.to(dtype)` and the like leave codes, book and scales alone, and any float x is accepted.

    Attributes:
        in_features, out_features: K and N.
        group_size: K-elements per scale.
        block_size: elements of the flattened weight per scale in files; group_size unless blocks cross
            the ends of rows.
        scaled: whether there are scales.

    Args:
        weight: in the canonical layout; the tensors are kept as they are.
        bias: [N] or None; a Parameter is kept as it is.
        dtype: that `weight` reports; by default the one that the weight had.

    Raises:
        ValueError: names the tensor, what it was and what was expected.
    """

    FORMAT: ClassVar[type | None] = LutFormat
    _FILE_BUFFERS = ("weight_packed", "weight_codebook", "weight_scale")
    _REPACKED_BUFFERS = ("weight_packed",)
    _KERNEL_BUFFERS = ("_qweight", "_codebook", "_scales")
    _SETTINGS = (*PackedLinear._SETTINGS, "group_size", "block_size", "scaled")

    weight_packed: Tensor
    weight_codebook: Tensor
    weight_scale: Tensor | None
    _qweight: Tensor
    _codebook: Tensor
    _scales: Tensor

    def __init__(
        self, weight: Lut4Weight, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = len(weight.qweight), 8 * weight.qweight.shape[1]
        self.group_size = weight.group_size
        self.block_size = weight.block_size or weight.group_size
        self.scaled = weight.scales is not None
        self._dtype = dtype or weight.dtype
        self._layout: str | None = None
        if self.group_size <= 0 or self.group_size % 32 or self.in_features % self.group_size:
            raise ValueError(
                f"group_size: got {self.group_size}, expected a multiple of 32 that divides "
                f"K = {self.in_features}"
            )
        tensors = (weight.qweight, weight.codebook, weight.scales)
        for name, tensor in (*zip(self._FILE_BUFFERS, tensors, strict=True), ("bias", bias)):
            if tensor is None:
                continue
            if problem := self.problem(name, tensor):
                raise ValueError(problem)
            if tensor.device != weight.qweight.device:
                raise ValueError(
                    f"{name}: got a tensor on {tensor.device}, expected {weight.qweight.device}"
                )
        for name, tensor in zip(self._FILE_BUFFERS, tensors, strict=True):
            self.register_buffer(name, None if tensor is None else tensor.detach().contiguous())
        if bias is None or isinstance(bias, nn.Parameter):
            self.register_parameter("bias", bias)
        else:
            self.bias = nn.Parameter(bias)

    @property
    def format(self) -> LutFormat | None:
        """What a rule says to get this layer; None where its book or blocks are no rule's."""
        kind = codebook_name(self.codebook)
        if kind is None or not self.scaled or self.block_size not in BLOCK_SIZES:
            return None
        return LutFormat(kind, self.block_size)

    @classmethod
    def from_format(cls, linear: nn.Module, fmt: LutFormat) -> Lut4Linear:
        """`from_linear` with the fields of a format."""
        return cls.from_linear(linear, fmt.codebook, fmt.block_size)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, codebook: str | Tensor = "nf4", block_size: int = 64
    ) -> Lut4Linear:
        """Quantize a linear layer block by block to the nearest entries of a book.

        Args:
            linear: nn.Linear, or transformers' Conv1D (weight [K, N]); float32, bfloat16 or float16.
            codebook: "nf4", "fp4", or float32 [16] in [-1, 1].
            block_size: elements of the flattened weight per scale.

        Returns:
            The packed layer; it shares `linear`'s bias parameter and training mode.

        Raises:
            ValueError: NaN or Inf in the weight, an unknown book, or blocks that do not fit the rows.
        """
        w = dense_weight(linear)
        if isinstance(codebook, str):
            if codebook not in CODEBOOKS:
                raise ValueError(
                    f"codebook: got {codebook!r}, expected {', '.join(CODEBOOKS)} or a tensor"
                )
            codebook = CODEBOOKS[codebook]
        group_size = group_size_of(block_size, w.shape[1])
        codes, absmax = quantize_blockwise(w, codebook, block_size)
        scales = group_scales(absmax, block_size, (w.shape[0], w.shape[1]))
        book = codebook.to(w.device, copy=True)
        weight = Lut4Weight(pack_codes(codes, 4), book, scales, group_size, block_size, w.dtype)
        return cls(weight, getattr(linear, "bias", None)).train(linear.training)

    @classmethod
    def from_parts(
        cls,
        codes: Tensor,
        codebook: Tensor,
        scales: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        group_size: int,
        dtype: torch.dtype = torch.float32,
    ) -> Lut4Linear:
        """Pack a quantized weight, w = scales * codebook[codes].

        Args:
            codes: uint8 [N, K] below 16.
            codebook: float32 [16], [N, 16] or [N, K/group_size, 16].
            scales: float32, bfloat16 or float16 [N, K/group_size], or None for the constant 1.
            bias: [N] or None; a Parameter is kept as it is.
            group_size: K-elements per scale, a multiple of 32 that divides K.
            dtype: that `weight` reports.

        Raises:
            ValueError: names the argument, what it was and what was expected.
        """
        qweight = pack_codes(codes, 4)
        if codes.shape[1] % 32:
            raise ValueError(f"codes: got {list(codes.shape)}, expected K a multiple of 32")
        return cls(Lut4Weight(qweight, codebook, scales, group_size, None, dtype), bias)

    @classmethod
    def from_bitsandbytes(
        cls, tensors: Mapping[str, Tensor], bias: Tensor | None = None
    ) -> Lut4Linear:
        """Wrap a 4-bit layer of bitsandbytes.

        Args:
            tensors: `weight`, `weight.absmax`, ... as in `llmkern.formats.bitsandbytes`.
            bias: [N]; by default `tensors["bias"]` if it is there.

        Raises:
            ValueError: a tensor is missing or does not fit the others.
        """
        return cls(from_bitsandbytes(tensors), tensors.get("bias") if bias is None else bias)

    def stored(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What `from_stored` needs of this layer beside its bias."""
        entry = {"group_size": self.group_size, "block_size": self.block_size}
        return entry, {k: t for k, t in self._file_tensors().items() if t is not None}

    @classmethod
    def from_stored(
        cls, entry: Mapping[str, Any], tensors: Mapping[str, Tensor], bias: nn.Parameter | None
    ) -> Lut4Linear:
        """The layer that `stored` described."""
        weight = Lut4Weight(
            tensors["weight_packed"],
            tensors["weight_codebook"],
            tensors.get("weight_scale"),
            entry["group_size"],
            entry["block_size"],
            entry["dtype"],
        )
        return cls(weight, bias)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Dense weight [N, K] in `dtype`, by default the layer's."""
        return dequantize_lut4(
            *self._operands(),
            group_size=self.group_size,
            dtype=dtype or self._dtype,
            layout=self._layout or "canonical",
        )

    def extra_repr(self) -> str:
        book = codebook_name(self.codebook) or list(self.codebook.shape)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, codebook={book}, group_size={self.group_size}, "
            f"layout={self._layout or 'file'}"
        )

    def problem(self, name: str, tensor: Tensor) -> str | None:
        """Why `tensor` cannot be this layer's `name`, or None."""
        N, K = self.out_features, self.in_features
        groups = K // self.group_size
        wanted: tuple[torch.dtype, ...]
        shapes: tuple[tuple[int, ...], ...]
        if name == "weight_codebook":
            check_codebook(tensor)
            wanted, shapes = (torch.float32,), ((16,), (N, 16), (N, groups, 16))
        else:
            wanted = (torch.int32,) if name == "weight_packed" else FLOATS
            one = {"weight_packed": (N, K // 8), "weight_scale": (N, groups)}
            shapes = (one.get(name, (N,)),)
        if tensor.dtype in wanted and tuple(tensor.shape) in shapes:
            return None
        kinds = " or ".join(map(dtype_name, wanted))
        return (
            f"{name}: got {dtype_name(tensor.dtype)} {list(tensor.shape)}, expected "
            f"{kinds} {' or '.join(str(list(s)) for s in shapes)} (N = {N}, K = {K}, group_size = "
            f"{self.group_size})"
        )

    def _multiply(self, x: Tensor, bias: Tensor | None, layout: str) -> Tensor:
        return lut4_gemm(x, *self._operands(), bias, group_size=self.group_size, layout=layout)

    @property
    def codebook(self) -> Tensor:
        """The book or books, float32 [16], [N, 16] or [N, K/group_size, 16]; those of groups in the
        kernels' place on a CUDA device, so that only their shape can be told there.
        """
        return self._codebook if self._layout == "cuda" else self.weight_codebook

    def _operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the kernels read: (qweight, codebook, scales) in `self._layout`."""
        if self._layout == "cuda":
            return self._qweight, self._codebook, self._scales
        packed = self.weight_packed if self._layout is None else self._qweight
        return packed, self.weight_codebook, self.weight_scale

    def _wanted_layout(self) -> str | None:
        packed = self.weight_packed
        return self._device_layout(packed) if self._may_repack(packed) else None

    def _repacked_buffers(self, layout: str) -> tuple[str, ...]:
        return self._FILE_BUFFERS if layout == "cuda" else self._REPACKED_BUFFERS

    def _to_layout(self, layout: str) -> Mapping[str, Tensor | None]:
        if layout == "cpu":
            return {"_qweight": to_cpu_layout(self.weight_packed)}
        packed = pack_lut4(*self._operands(), self.group_size)
        return dict(zip(self._KERNEL_BUFFERS, packed, strict=True))

    def _file_tensors(self) -> dict[str, Tensor | None]:
        if self._layout is None:
            return {name: self._buffers[name] for name in self._FILE_BUFFERS}
        with torch.inference_mode(False), torch.no_grad():
            if self._layout == "cuda":
                parts: tuple[Tensor | None, ...]
                parts = unpack_lut4(self._qweight, self._codebook, self._scales, self.group_size)
            else:
                packed = from_cpu_layout(self._qweight)
                parts = (packed, self.weight_codebook, self.weight_scale)
        return dict(zip(self._FILE_BUFFERS, parts, strict=True))

    def own_tensors(self) -> dict[str, Tensor]:
        """bitsandbytes' tensors for its tables, else those of the canonical layout."""
        if not self.scaled or codebook_name(self.codebook) is None:
            return super().own_tensors()
        packed, codebook, scales = self._file_tensors().values()
        assert packed is not None
        assert codebook is not None
        weight = Lut4Weight(packed, codebook, scales, self.group_size, self.block_size, self._dtype)
        return to_bitsandbytes(weight)

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
        own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        try:
            own = self._canonical(own)
            problems = [
                self.problem(name, own[name])
                for name in (*self._FILE_BUFFERS, "bias")
                if name in own and getattr(self, name) is not None
            ]
        except ValueError as error:
            problems = [str(error)]
        if any(problems):
            error_msgs.extend(prefix + problem for problem in problems if problem)
            return
        # Of what a parameter or buffer keeps through copy_, book and scales may take another form.
        for name in ("weight_codebook", "weight_scale"):
            held = self._buffers[name]
            if held is not None and name in own:
                self._buffers[name] = torch.empty_like(own[name], device=held.device)
        super()._load_own(
            {prefix + name: tensor for name, tensor in own.items()},
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    def _canonical(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state_dict in either form with the names of `_FILE_BUFFERS`."""
        if "weight" not in tensors:
            return tensors
        weight = from_bitsandbytes(tensors)
        shape = (len(weight.qweight), 8 * weight.qweight.shape[1])
        if (*shape, weight.block_size) != (self.out_features, self.in_features, self.block_size):
            raise ValueError(
                f"weight: got {list(shape)} in blocks of {weight.block_size}, expected "
                f"{[self.out_features, self.in_features]} in blocks of {self.block_size}"
            )
        assert weight.scales is not None
        rest = {k: v for k, v in tensors.items() if k.split(".")[0] != "weight"}
        found = zip(self._FILE_BUFFERS, (*weight[:2], weight.scales), strict=True)
        return {**rest, **dict(found)}
