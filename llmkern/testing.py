"""What the project's tests, and the tests of code built on it, compare kernels with."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llmkern.formats import int4_cuda, lut4_cuda, sparse24_cuda
from llmkern.formats.int4 import pack_codes, pack_zeros
from llmkern.formats.lut4 import NF4_CODEBOOK
from llmkern.formats.sparse24 import NIBBLES, decompress
from llmkern.ops import (
    _cuda_layout,
    dequantize_int4,
    dequantize_lut4,
    lut4_gemm,
    sparse24_gemm,
    sparse24_w4a16_gemm,
    w4a16_gemm,
)
from llmkern.reference import lut4_gemm as lut4_spec
from llmkern.reference import w4a16_gemm as int4_spec
from llmkern.reference.sparse24_w4a16_gemm import dequantize_sparse24

# The three tensors of a weight: qweight, scales, zeros; or qweight, codebook, scales.
Weight = tuple[Any, Any, Any]


def assert_matches(out: Tensor, spec: Tensor, like: Tensor, slack: float = 2.0) -> None:
    """Check a kernel against a float64 specification, with a tolerance that nobody tunes.

    The largest error of `out` may be `slack` times the largest error that plain torch makes on the same
    job in the same dtype, plus one unit in the last place at the output's scale.

    Args:
        out: the kernel's result, any float dtype.
        spec: float64, the exact result.
        like: plain torch's result for the same job, in out's dtype.
        slack: factor on plain torch's error.

    Raises:
        AssertionError: shapes or dtypes differ, `out` holds NaN, or the error is too large.
    """
    assert out.shape == spec.shape, f"shape {tuple(out.shape)}, expected {tuple(spec.shape)}"
    assert out.dtype == like.dtype, f"dtype {out.dtype}, expected {like.dtype}"
    if out.numel() == 0:
        return
    assert not torch.isnan(out).any(), "the output holds NaN (an element never written?)"
    error = (out.double() - spec).abs().max().item()
    torch_error = (like.double() - spec).abs().max().item()
    ulp = torch.finfo(out.dtype).eps * spec.abs().max().item()
    bound = slack * torch_error + ulp
    assert error <= bound, (
        f"max error {error:.3e}, plain torch's {torch_error:.3e}, bound {bound:.3e}"
    )


def relative_error(out: Tensor, spec: Tensor) -> float:
    """Frobenius norm of out - spec over that of spec, in float64."""
    spec = spec.double()
    return float((out.double() - spec).norm() / spec.norm())


def random_hessian(K: int, seed: int = 0) -> Tensor:
    """float64 [K, K], 2/n XᵀX of correlated inputs with spread channel scales."""
    g = torch.Generator().manual_seed(seed)
    low = torch.randn(K // 4 + 1, K, generator=g, dtype=torch.float64)
    x = torch.randn(2 * K + 8, len(low), generator=g, dtype=torch.float64) @ low / len(low) ** 0.5
    x += 0.3 * torch.randn(len(x), K, generator=g, dtype=torch.float64)
    x *= torch.exp(0.5 * torch.randn(K, generator=g, dtype=torch.float64))
    H: Tensor = x.t() @ x * (2 / len(x))
    return H


def row_losses(w: Tensor, w_hat: Tensor, H: Tensor, damp: float) -> Tensor:
    """(w - w_hat) H (w - w_hat)ᵀ of each row in float64, H damped."""
    H = H.double() + damp * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    E = w.double() - w_hat.double()
    losses: Tensor = (E @ H * E).sum(1)
    return losses


def random_int4_weight(
    N: int,
    K: int,
    group_size: int,
    *,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random qweight, scales and zeros in the canonical layout, the weight of about unit norm per row."""
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8)
    groups = K // group_size
    scales = ((torch.rand(N, groups) + 0.5) / (5 * K**0.5)).to(scale_dtype)
    zeros = None
    if not symmetric:
        zeros = pack_zeros(torch.randint(0, 16, (N, groups), dtype=torch.uint8), 4)
    return pack_codes(codes, 4), scales, zeros


def random_lut4_weight(
    N: int,
    K: int,
    group_size: int,
    *,
    book: str = "nf4",
    scale_dtype: torch.dtype | None = torch.float32,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random qweight, codebook and scales in the canonical layout, of about unit norm per row.

    Args:
        N, K, group_size: of the weight.
        book: "nf4", "tensor" (a random book), "row" or "group".
        scale_dtype: None for no scales.
    """
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8)
    shapes = {"tensor": (16,), "row": (N, 16), "group": (N, K // group_size, 16)}
    codebook = NF4_CODEBOOK.clone() if book == "nf4" else torch.randn(shapes[book])
    scales = None
    if scale_dtype is None:
        codebook /= K**0.5
    else:
        scales = ((torch.rand(N, K // group_size) + 0.5) / K**0.5).to(scale_dtype)
    return pack_codes(codes, 4), codebook, scales


@dataclass(frozen=True)
class CodeCase:
    """A product with a weight of 4-bit codes, for tests in the emulator and on a GPU alike.

    Attributes:
        M, N, K, group_size: of the product.
        values: what codes stand for: integers, "symmetric" or with "zeros"; or the entries of a book,
            "nf4", "tensor", "row" or "group".
        scale_dtype: None for no scales (books only).
    """

    M: int
    N: int
    K: int
    group_size: int
    values: str = "symmetric"
    scale_dtype: torch.dtype | None = torch.float32

    @property
    def integers(self) -> bool:
        """Whether w4a16_gemm serves it; else lut4_gemm."""
        return self.values in ("symmetric", "zeros")

    def weight(self, device: torch.device | str = "cpu") -> Weight:
        """Random, in the canonical layout: the op's three tensors."""
        if self.integers:
            assert self.scale_dtype is not None
            parts = random_int4_weight(
                self.N,
                self.K,
                self.group_size,
                symmetric=self.values == "symmetric",
                scale_dtype=self.scale_dtype,
            )
        else:
            parts = random_lut4_weight(
                self.N, self.K, self.group_size, book=self.values, scale_dtype=self.scale_dtype
            )
        first, second, third = (None if t is None else t.to(device) for t in parts)
        return first, second, third

    def pack(self, weight: Weight, *, kernel: bool = True) -> Weight:
        """In the cuda layout; by the CUDA kernels if they serve here, and unless `kernel` is False."""
        convert: Any
        if self.integers:
            convert = _cuda_layout.pack_int4 if kernel else int4_cuda.to_cuda_layout
        else:
            convert = _cuda_layout.pack_lut4 if kernel else lut4_cuda.to_cuda_layout
        packed: Weight = convert(*weight, self.group_size)
        return packed

    def unpack(self, packed: Weight, *, kernel: bool = True) -> Weight:
        """Inverse of `pack`."""
        convert: Any
        if self.integers:
            convert = _cuda_layout.unpack_int4 if kernel else int4_cuda.from_cuda_layout
        else:
            convert = _cuda_layout.unpack_lut4 if kernel else lut4_cuda.from_cuda_layout
        weight: Weight = convert(*packed, self.group_size)
        return weight

    def multiply(
        self, x: Tensor, weight: Weight, bias: Tensor | None = None, layout: str = "canonical"
    ) -> Tensor:
        """x wᵀ + bias by the op."""
        op: Any = w4a16_gemm if self.integers else lut4_gemm
        y: Tensor = op(x, *weight, bias, group_size=self.group_size, layout=layout)
        return y

    def dequantize(self, weight: Weight, dtype: torch.dtype, layout: str) -> Tensor:
        """The dense weight by the op."""
        op: Any = dequantize_int4 if self.integers else dequantize_lut4
        w: Tensor = op(*weight, group_size=self.group_size, dtype=dtype, layout=layout)
        return w

    def dense(self, weight: Weight, dtype: torch.dtype = torch.float64) -> Tensor:
        """The dense weight by the specification, from the canonical layout."""
        spec: Any = int4_spec.dequantize_int4 if self.integers else lut4_spec.dequantize_lut4
        w: Tensor = spec(*weight, self.group_size, dtype)
        return w

    def check(
        self, out: Tensor, x: Tensor, weight: Weight, bias: Tensor | None, slack: float
    ) -> None:
        """`assert_matches` of a product with the canonical weight."""
        w = self.dense(weight)
        wide = None if bias is None else bias.double()
        spec = torch.nn.functional.linear(x.double(), w, wide)
        like = torch.nn.functional.linear(x, w.to(x.dtype), bias)
        assert_matches(out, spec, like, slack)


# A line per hazard.
CANONICAL_CASES = {
    "m1_lanes_without_work": CodeCase(1, 9, 96, 32),
    "m1_k_loop_runs_twice": CodeCase(1, 5, 1056, 96, "zeros", torch.float16),
    "m2_n_odd": CodeCase(2, 37, 128, 128, "zeros", torch.bfloat16),
    "m3_row_tail": CodeCase(3, 8, 64, 32, "zeros"),
    "m8_one_column": CodeCase(8, 1, 64, 64),
    "m9_first_of_the_tiles": CodeCase(9, 65, 64, 32, "zeros", torch.float16),
    "m33_long_k": CodeCase(33, 20, 2048, 128),
    "m130_three_row_tiles": CodeCase(130, 70, 96, 96, "symmetric", torch.bfloat16),
    "m1_nf4": CodeCase(1, 9, 96, 32, "nf4"),
    "m1_group_books_k_loop_runs_twice": CodeCase(1, 5, 1056, 96, "group", torch.float16),
    "m2_row_books": CodeCase(2, 37, 128, 128, "row", torch.bfloat16),
    "m3_no_scales": CodeCase(3, 8, 64, 32, "nf4", None),
    "m8_group_books_one_column": CodeCase(8, 1, 64, 64, "group", None),
    "m9_nf4": CodeCase(9, 65, 64, 32, "nf4", torch.float16),
    "m17_row_books": CodeCase(17, 70, 96, 96, "row", None),
    "m50_group_books": CodeCase(50, 30, 512, 256, "group"),
}
CUDA_LAYOUT_CASES = {
    "m1_one_chunk": CodeCase(1, 64, 128, 128, "symmetric", torch.bfloat16),
    "m1_split_k": CodeCase(1, 70, 2176, 128, "zeros", torch.float16),
    "m3_k_tail_n_odd": CodeCase(3, 5, 96, 32, "zeros"),
    "m8_split_k_uneven": CodeCase(8, 65, 1344, 64),
    "m9_group_of_96": CodeCase(9, 72, 288, 96, "zeros", torch.bfloat16),
    "m16_one_group": CodeCase(16, 8, 1024, 1024, "symmetric", torch.float16),
    "m32_g64_zeros": CodeCase(32, 130, 1280, 64, "zeros", torch.float16),
    "m33_first_of_the_tiles": CodeCase(33, 65, 160, 32, "zeros"),
    "m65_half_a_wide_tile": CodeCase(65, 150, 160, 32, "zeros"),
    "m130_two_row_tiles_split_k": CodeCase(130, 70, 1024, 128, "symmetric", torch.bfloat16),
    "m1_nf4": CodeCase(1, 64, 128, 64, "nf4"),
    "m2_nf4_split_k": CodeCase(2, 70, 2176, 64, "nf4", torch.bfloat16),
    "m5_no_scales": CodeCase(5, 9, 96, 96, "tensor", None),
    "m8_row_books": CodeCase(8, 70, 288, 96, "row", torch.float16),
    "m16_group_books": CodeCase(16, 66, 160, 32, "group"),
    "m20_group_books_no_scales": CodeCase(20, 65, 512, 256, "group", None),
    "m33_row_books_no_scales": CodeCase(33, 70, 256, 128, "row", None),
    "m66_nf4": CodeCase(66, 150, 192, 64, "nf4"),
    "m70_group_books": CodeCase(70, 70, 128, 64, "group", torch.float16),
    "m129_row_books": CodeCase(129, 130, 96, 32, "row", torch.bfloat16),
}


def random_sparse24_meta(N: int, K: int) -> Tensor:
    """Random metadata uint8 [N, K/8] of a 2:4 sparse weight, every pattern as likely as the others."""
    nibbles = torch.tensor(NIBBLES, dtype=torch.uint8)[torch.randint(0, 6, (N, K // 4))]
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4


def random_sparse24_weight(N: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random values [N, K/2] and metadata uint8 [N, K/8], the weight of about unit norm per row.

    One value in eight is zero, so that groups with fewer than two non-zeros are among them.
    """
    values = torch.randn(N, K // 2) * (2 / K) ** 0.5
    return (values * (torch.rand(N, K // 2) >= 0.125)).to(dtype), random_sparse24_meta(N, K)


def random_sparse24_int4_weight(
    N: int,
    K: int,
    group_size: int,
    *,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Random qvalues, meta, scales and zeros in the canonical layout, about unit norm per row."""
    codes = torch.randint(0, 16, (N, K // 2), dtype=torch.uint8)
    _, scales, zeros = random_int4_weight(
        N, K, group_size, symmetric=symmetric, scale_dtype=scale_dtype
    )
    return pack_codes(codes, 4), random_sparse24_meta(N, K), scales, zeros


@dataclass(frozen=True)
class Sparse24Case:
    """A 2:4 product as a test of sparse24_gemm, or with a group size of sparse24_w4a16_gemm.

    Attributes:
        M, N, K: of the product.
        group_size: columns per scale; None: 16-bit or float32 values.
        symmetric, scale_dtype: of 4-bit codes.
    """

    M: int
    N: int
    K: int
    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.float32

    def weight(self, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """A random weight in the canonical layout, values in `dtype`."""
        if self.group_size is None:
            return random_sparse24_weight(self.N, self.K, dtype)
        return random_sparse24_int4_weight(
            self.N,
            self.K,
            self.group_size,
            symmetric=self.symmetric,
            scale_dtype=self.scale_dtype,
        )

    def dense(self, weight: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
        """The weight [N, K], rounded to `dtype` once."""
        if self.group_size is None:
            return decompress(*weight).to(dtype)
        qvalues, meta, scales, zeros = weight
        return dequantize_sparse24(qvalues, meta, scales, zeros, self.group_size, dtype)

    def pack(self, weight: tuple[Any, ...]) -> tuple[Any, ...]:
        """The weight in the cuda layout."""
        if self.group_size is None:
            return sparse24_cuda.to_cuda_layout(*weight)
        qvalues, meta, scales, zeros = weight
        return sparse24_cuda.int4_to_cuda_layout(qvalues, meta, scales, zeros, self.group_size)

    def multiply(
        self,
        x: Tensor,
        weight: tuple[Any, ...],
        bias: Tensor | None = None,
        layout: str = "canonical",
    ) -> Tensor:
        """The product by the op."""
        if self.group_size is None:
            values, meta = weight
            return sparse24_gemm(x, values, meta, bias, layout=layout)
        qvalues, meta, scales, zeros = weight
        return sparse24_w4a16_gemm(
            x, qvalues, meta, scales, zeros, bias, group_size=self.group_size, layout=layout
        )

    def check(
        self,
        out: Tensor,
        x: Tensor,
        weight: tuple[Any, ...],
        bias: Tensor | None = None,
        slack: float = 2.0,
    ) -> None:
        """Compare a product with float64, as `assert_matches` does."""
        spec = x.double() @ self.dense(weight, torch.float64).t()
        if bias is not None:
            spec += bias.double()
        like = torch.nn.functional.linear(x, self.dense(weight, x.dtype), bias)
        assert_matches(out, spec, like, slack)


# 2:4 products over weights in the cuda layout, a line per hazard, for the emulator and a GPU.
SPARSE24_CASES = {
    "m1_one_chunk": Sparse24Case(1, 64, 128),
    "m1_split_k": Sparse24Case(1, 70, 2176),
    "m3_k_tail_n_odd": Sparse24Case(3, 5, 104),
    "m8_ring_wraps": Sparse24Case(8, 65, 1344),
    "m16_n_tail": Sparse24Case(16, 72, 288),
    "m33_first_of_the_tiles": Sparse24Case(33, 65, 160),
    "m130_three_row_tiles": Sparse24Case(130, 70, 768),
    "m257_large_tiles": Sparse24Case(257, 70, 640),
    "m300_large_tiles_k_tail": Sparse24Case(300, 133, 136),
    "codes_m1_one_chunk": Sparse24Case(1, 64, 128, 128),
    "codes_m1_split_k": Sparse24Case(1, 70, 2176, 128, False, torch.float16),
    "codes_m3_k_tail_n_odd": Sparse24Case(3, 5, 96, 32, False),
    "codes_m9_group_of_96": Sparse24Case(9, 72, 288, 96, False, torch.bfloat16),
    "codes_m16_one_group": Sparse24Case(16, 8, 1024, 1024, True, torch.float16),
    "codes_m32_g64_zeros": Sparse24Case(32, 130, 1280, 64, False, torch.float16),
    "codes_m33_first_of_the_tiles": Sparse24Case(33, 65, 160, 32, False),
    "codes_m257_large_tiles_g128": Sparse24Case(257, 70, 640, 128, True, torch.bfloat16),
    "codes_m257_large_tiles_g64": Sparse24Case(257, 65, 448, 64, False, torch.float16),
    "codes_m300_large_tiles_g32": Sparse24Case(300, 133, 160, 32, False),
}


class TensorPeak(TorchDispatchMode):
    """Context that watches how many bytes of tensors are alive, those of `model` apart.

    Attributes:
        now: bytes at this moment.
        most: the largest `now` so far.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.untyped_storage()._tracked = True  # type: ignore[attr-defined]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self._track(tensor.untyped_storage())
        return out

    def _track(self, storage: torch.UntypedStorage) -> None:
        if getattr(storage, "_tracked", False):
            return
        storage._tracked = True  # type: ignore[attr-defined]
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size
