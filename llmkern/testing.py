"""What the project's tests, and the tests of code built on it, compare kernels with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmkern.formats import sparse24_cuda
from llmkern.formats.int4 import pack_codes, pack_zeros
from llmkern.formats.lut4 import NF4_CODEBOOK
from llmkern.formats.sparse24 import NIBBLES, decompress
from llmkern.ops import sparse24_gemm, sparse24_w4a16_gemm
from llmkern.reference.sparse24_w4a16_gemm import dequantize_sparse24


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


# w4a16_gemm over weights in the cuda layout, a line per hazard: M, N, K, group size, symmetric, scale
# dtype. Tests in the emulator and on a GPU share them.
CUDA_LAYOUT_CASES = {
    "m1_one_chunk": (1, 64, 128, 128, True, torch.bfloat16),
    "m1_split_k": (1, 70, 2176, 128, False, torch.float16),
    "m3_k_tail_n_odd": (3, 5, 96, 32, False, torch.float32),
    "m8_ring_wraps": (8, 65, 1344, 64, True, torch.float32),
    "m9_group_of_96": (9, 72, 288, 96, False, torch.bfloat16),
    "m16_one_group": (16, 8, 1024, 1024, True, torch.float16),
    "m32_g64_zeros": (32, 130, 1280, 64, False, torch.float16),
    "m33_first_of_the_tiles": (33, 65, 160, 32, False, torch.float32),
    "m130_three_row_tiles": (130, 70, 768, 128, True, torch.bfloat16),
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
