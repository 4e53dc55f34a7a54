"""Sparse24Int4Linear: a linear layer of 4-bit codes of which two of every four columns are held."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmkern import _backends
from llmkern.formats import sparse24_cpu, sparse24_cuda
from llmkern.formats.int4 import (
    QuantFormat,
    pack_codes,
    unpack_codes,
    unpack_zeros,
)
from llmkern.formats.sparse24 import compress_codes, decompress_codes, is_pruned24
from llmkern.nn.int_linear import IntLinear
from llmkern.ops.dequantize_sparse24 import dequantize_sparse24
from llmkern.ops.sparse24_w4a16_gemm import sparse24_w4a16_gemm


class Sparse24Int4Linear(IntLinear):
    """An `IntLinear` whose weight is 2:4 sparse: a code that is its zero point counts as pruned.

    It is loaded, saved and inspected as an `IntLinear`: the state_dict is compressed-tensors' own, with
    the pruned codes in it, so that anything that reads such files reads this one. `llmkern.prepare`, or
    the first forward pass, replaces these tensors by the kept codes and their places, three quarters of
    the bytes; `state_dict`, `deepcopy` and pickling give them back bit for bit.

    Args:
        in_features: K, a multiple of the group size.
        out_features: N, any.
        bias: whether there is a bias.
        format: 4 bits and groups of a multiple of 32 columns.
        device: of the uninitialised tensors; "meta" for a layer to be loaded with assign=True.
        dtype: of the bias, the scales and what `weight` reports.

    Raises:
        ValueError: another width or group size, or a group size that does not divide in_features.
    """

    FORMAT = None  # found in an int4 weight, not asked for
    _KERNEL_BUFFERS = ("_qvalues", "_meta", "_scales", "_zeros")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        format: QuantFormat | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, format, device, dtype)
        if self.bits != 4:
            raise ValueError(f"bits: got {self.bits}, expected 4 (2:4 sparsity)")
        if self.group_size % 32:
            raise ValueError(
                f"group_size: got {self.group_size}, expected a multiple of 32 (2:4 sparsity)"
            )

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
        mask: Tensor | None = None,
    ) -> Sparse24Int4Linear:
        """Pack a quantized weight, w = scales * (codes - zeros) where kept.

        Args:
            codes, scales, zeros, bias, bits, group_size, dtype: as `IntLinear.from_parts`.
            mask: bool [N, K] of what is kept; by default the codes that are not their zero point.

        Raises:
            ValueError: names the argument, what it was and what was expected; more than two of some 4
                columns are kept (the first row is named).
        """
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != codes.shape:
                raise ValueError(f"mask: got {list(mask.shape)}, expected bool {list(codes.shape)}")
            fill = (
                torch.full_like(codes, 8)
                if zeros is None
                else zeros.repeat_interleave(codes.shape[1] // zeros.shape[1], 1)
            )
            codes = torch.where(mask, codes, fill)
        layer = super().from_parts(
            codes, scales, zeros, bias, bits=bits, group_size=group_size, dtype=dtype
        )
        assert isinstance(layer, Sparse24Int4Linear)
        return layer

    @classmethod
    def from_packed(cls, *args: Any, **kwargs: Any) -> Sparse24Int4Linear:
        """Wrap tensors of an int4 weight, as `IntLinear.from_packed`, whose codes are 2:4 sparse.

        Raises:
            ValueError: as there; more than two of some 4 codes are not their zero point (the first row
                is named).
        """
        layer = super().from_packed(*args, **kwargs)
        assert isinstance(layer, Sparse24Int4Linear)
        if not layer.weight_packed.is_meta:
            layer._sparse_operands()
        return layer

    @classmethod
    def from_pattern(cls, linear: nn.Module) -> Sparse24Int4Linear | None:
        """The sparse layer of a plain `IntLinear` that has been pruned to 2:4, or None."""
        if type(linear) is not IntLinear or linear.bits != 4 or linear.group_size % 32:
            return None
        # Those of the file, whatever the kernels hold.
        tensors = linear._file_tensors()
        packed, zeros = tensors["weight_packed"], tensors["weight_zero_point"]
        if packed is None or packed.is_meta:
            return None
        # Modulo 256: 0 where the weight is.
        steps = unpack_codes(packed, 4, linear.in_features)
        if zeros is None:
            steps = steps - 8
        else:
            points = unpack_zeros(zeros, 4, linear.out_features)
            steps = steps - points.repeat_interleave(linear.group_size, 1)
        if not is_pruned24(steps):
            return None
        layer = cls.from_packed(
            packed,
            tensors["weight_scale"],
            zeros,
            linear.bias,
            in_features=linear.in_features,
            format=linear.format,
            dtype=linear.dtype,
        )
        layer.file_form, layer.left = linear.file_form, linear.left
        return layer

    def _sparse_operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(qvalues, meta, scales, zeros) of the canonical sparse layout, from the file's tensors."""
        N, K = self._shape
        zeros = self.weight_zero_point
        codes, points = unpack_codes(self.weight_packed, 4, K), None
        centre: Tensor | int = 8
        if zeros is not None:
            points = unpack_zeros(zeros, 4, N)
            centre = points.repeat_interleave(self.group_size, 1)
        try:
            qvalues, meta = compress_codes(codes, codes != centre, points)
        except ValueError as error:
            raise ValueError(f"weight_packed{str(error).removeprefix('mask')}") from error
        return qvalues, meta, self.weight_scale, zeros

    def _kernel_operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        qvalues, meta, scales, zeros = (self._buffers.get(name) for name in self._KERNEL_BUFFERS)
        assert qvalues is not None
        assert meta is not None
        assert scales is not None
        return qvalues, meta, scales, zeros

    def _multiply(self, x: Tensor, bias: Tensor | None, layout: str) -> Tensor:
        if self._layout is None:  # the file's tensors, while they cannot be repacked
            return super()._multiply(x, bias, layout)
        operands = self._kernel_operands()
        return sparse24_w4a16_gemm(x, *operands, bias, group_size=self.group_size, layout=layout)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Dense weight [N, K] in `dtype`, by default the layer's."""
        if self._layout is None:
            return super().dequantize(dtype)
        return dequantize_sparse24(
            *self._kernel_operands(),
            group_size=self.group_size,
            dtype=dtype or self._dtype,
            layout=self._layout,
        )

    def _wanted_layout(self) -> str | None:
        packed = self.weight_packed
        if not self._may_repack(packed):
            return None
        forced = _backends.forced_backend()
        serves_cpu = forced in (None, "cpu") and _backends.refuse_cpu(packed.device.type) is None
        if serves_cpu and sparse24_cpu.fits(*self._shape):
            return "cpu"
        tensor_cores = forced in (None, "cuda") and self._dtype != torch.float32
        if tensor_cores and _backends.refuse_cuda(packed.device) is None:
            return "cuda"
        return "canonical"

    def _to_layout(self, layout: str) -> Mapping[str, Tensor | None]:
        operands = self._sparse_operands()
        if layout == "cpu":
            operands = sparse24_cpu.int4_to_cpu_layout(*operands, self.group_size)
        elif layout == "cuda":
            operands = sparse24_cuda.int4_to_cuda_layout(*operands, self.group_size)
        return dict(zip(self._KERNEL_BUFFERS, operands, strict=True))

    def _file_tensors(self) -> dict[str, Tensor | None]:
        if self._layout is None:
            return {name: self._buffers[name] for name in self._FILE_BUFFERS}
        with torch.inference_mode(False), torch.no_grad():
            operands = self._kernel_operands()
            if self._layout == "cpu":
                operands = sparse24_cpu.int4_from_cpu_layout(*operands, self.group_size)
            elif self._layout == "cuda":
                operands = sparse24_cuda.int4_from_cuda_layout(*operands, self.group_size)
            qvalues, meta, scales, zeros = operands
            points = None if zeros is None else unpack_zeros(zeros, 4, self.out_features)
            codes, _ = decompress_codes(qvalues, meta, points)
            tensors = (pack_codes(codes, 4), scales, zeros, self.weight_shape)
        return dict(zip(self._FILE_BUFFERS, tensors, strict=True))

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
        before = len(error_msgs)
        super()._load_own(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        loaded = prefix + "weight_packed" in state_dict and len(error_msgs) == before
        if loaded and not self.weight_packed.is_meta:
            try:
                self._sparse_operands()
            except ValueError as error:
                error_msgs.append(prefix + str(error))
