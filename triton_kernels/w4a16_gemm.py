"""w4a16_gemm: out[m, n] = sum_k x[m, k] * w[n, k] + bias[n], 4-bit w in the canonical layout.

Half a byte is read per weight: at small M the product is bound by that stream, at large M by the tensor
cores. Two kernels:

gemv  M = 1 (up to 4 in float32): multiply-adds, no tensor core; every product exact in float32.
tile  acc[n, m] = W[n, k] @ xT[k, m]: the weights are the left operand, so that they reach the tensor core
      from registers and a small M pads the narrow side of the instruction. A tile of W lies in one
      group. Up to M = 64 it holds the exact integers code - zero, and each group's sum is scaled in
      float32; above, it is dequantized to x's dtype, rounded once. float32 x is multiplied in float32,
      never through TF32.

A tall K is split over programs where N alone does not fill the GPU; the split depends on N and K only,
and the partial sums are added in a fixed order, so results repeat bit for bit.

Run in Triton's interpreter and compiled ahead of time for sm_80 and sm_90; not yet run on a GPU, so the
limits between the tiers are estimates.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .device import DEFAULT_SMS, num_sms, on_device
from .int4 import dequantize_tile, load_zeros, unpack_plane
from .numerics import dot, narrow


@dataclass(frozen=True)
class Config:
    kernel: str  # "gemv" or "tile"
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    SPLIT_K: int
    EXACT: bool  # multiply integers, then scale; else dequantize to x's dtype
    num_warps: int
    num_stages: int


def select_config(
    M: int, N: int, K: int, group_size: int, float32: bool, num_sms: int = DEFAULT_SMS
) -> Config:
    """Kernel and tile for a shape; `float32` is whether x is."""
    divisor = group_size & -group_size  # of the group size, the largest power of two
    if (4 if float32 else 1) >= M:
        split = _split_k(N, K, 32, 256, 4 * num_sms)
        return Config("gemv", 1, 32, 256, split, True, 4, 3)
    if float32:
        split = _split_k(N, K, 64, 256, 2 * num_sms) if M <= 32 else 1
        return Config("tile", 32, 64, 32, split, False, 4, 2)
    if M <= 64:
        block_m = max(16, 1 << (M - 1).bit_length())
        split = _split_k(N, K, 64, 512, 2 * num_sms)
        # 64 columns and 128 codes per row do not fit the registers of 4 warps on sm_80.
        block_k = min(128 if block_m < 64 else 64, divisor)
        return Config("tile", block_m, 64, block_k, split, True, 4, 4)
    block_m = 64 if num_sms > -(-N // 128) * -(-M // 128) else 128
    warps = 8 if block_m == 128 else 4
    return Config("tile", block_m, 128, min(64, divisor), 1, False, warps, 3)


def _split_k(N: int, K: int, block_n: int, least_k: int, programs: int) -> int:
    """Programs along K: a power of two that makes about `programs` of them, least_k or more each."""
    wanted = min(programs // -(-N // block_n), K // least_k, 16)
    return 1 << (wanted.bit_length() - 1) if wanted > 1 else 1


@triton.jit
def _store_tile(acc, out_ptr, bias_ptr, rows, cols, split, M, N):
    """acc [n, m] of one split to out[split, m, n], with the bias."""
    mask = (rows < N)[:, None] & (cols < M)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    offsets = (split * M + cols.to(tl.int64))[None, :] * N + rows[:, None]
    tl.store(out_ptr + offsets, narrow(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def w4a16_gemm_gemv_kernel(
    x_ptr,
    qweight_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_xm,
    split_words,
    GROUP_SIZE: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    # Rows of x are the fast axis: their programs read the same weights at the same time.
    m = tl.program_id(0) % M
    rows = (tl.program_id(0) // M * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    split = tl.program_id(1)
    words_per_row = K // 8
    num_groups = K // GROUP_SIZE
    mask_n = rows < N
    first = split * split_words
    last = tl.minimum(first + split_words, words_per_row)
    acc = tl.zeros((BLOCK_N, BLOCK_K // 8), tl.float32)
    for start in tl.range(first, last, BLOCK_K // 8, num_stages=NUM_STAGES):
        offs_w = start + tl.arange(0, BLOCK_K // 8)
        mask_w = offs_w < last
        mask = mask_n[:, None] & mask_w[None, :]
        words = tl.load(
            qweight_ptr + rows[:, None] * words_per_row + offs_w[None, :], mask=mask, other=0
        )  # [BLOCK_N, BLOCK_K / 8]
        groups = offs_w // (GROUP_SIZE // 8)
        scales = tl.load(
            scales_ptr + rows[:, None] * num_groups + groups[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        zeros = load_zeros(zeros_ptr, rows[:, None], groups[None, :], num_groups, mask)
        part = tl.zeros((BLOCK_N, BLOCK_K // 8), tl.float32)
        x_ptrs = x_ptr + m.to(tl.int64) * stride_xm + offs_w * 8
        for plane in tl.static_range(8):
            x = tl.load(x_ptrs + plane, mask=mask_w, other=0.0).to(tl.float32)
            part = tl.fma(unpack_plane(words, zeros, plane), x[None, :], part)
        acc = tl.fma(scales, part, acc)
    sums = tl.sum(acc, axis=1)
    _store_tile(sums[:, None], out_ptr, bias_ptr, rows, m + tl.arange(0, 1), split, M, N)


@triton.jit
def w4a16_gemm_tile_kernel(
    x_ptr,
    qweight_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_xm,
    split_words,
    GROUP_SIZE: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    # Eight blocks of rows share each tile of x while it lies in L2.
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks_m = tl.cdiv(M, BLOCK_M)
    band = tl.program_id(0) // (8 * blocks_m)
    band_rows = tl.minimum(blocks_n - band * 8, 8)
    within = tl.program_id(0) % (8 * blocks_m)
    rows = ((band * 8 + within % band_rows) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    cols = (within // band_rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    mask_n = rows < N
    mask_m = cols < M
    words_per_row = K // 8
    num_groups = K // GROUP_SIZE
    dtype = x_ptr.dtype.element_ty
    first = split * split_words
    last = tl.minimum(first + split_words, words_per_row)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in tl.range(first, last, BLOCK_K // 8, num_stages=NUM_STAGES):
        offs_w = start + tl.arange(0, BLOCK_K // 8)
        words = tl.load(
            qweight_ptr + rows[:, None] * words_per_row + offs_w[None, :],
            mask=mask_n[:, None],
            other=0,
        )  # [BLOCK_N, BLOCK_K / 8]
        offs_k = start * 8 + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + cols.to(tl.int64)[None, :] * stride_xm + offs_k[:, None],
            mask=mask_m[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_M]
        group = start // (GROUP_SIZE // 8)
        scales = tl.load(scales_ptr + rows * num_groups + group, mask=mask_n, other=0.0)
        zeros = load_zeros(zeros_ptr, rows, group, num_groups, mask_n)
        scales = scales.to(tl.float32)[:, None]
        if EXACT:
            w = dequantize_tile(words, 1.0, zeros[:, None], dtype)
            acc = tl.fma(scales, dot(w, x, tl.zeros_like(acc)), acc)
        else:
            w = dequantize_tile(words, scales, zeros[:, None], dtype)
            acc = dot(w, x, acc)
    _store_tile(acc, out_ptr, bias_ptr, rows, cols, split, M, N)


@triton.jit
def w4a16_gemm_reduce_kernel(
    partial_ptr, bias_ptr, out_ptr, size, N, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr
):
    """out = sum over splits, first to last, + bias; `size` = M * N."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    acc = tl.zeros((BLOCK,), tl.float32)
    partial_ptrs = partial_ptr + offsets
    for _ in tl.static_range(SPLIT_K):
        acc += tl.load(partial_ptrs, mask=mask, other=0.0)
        partial_ptrs += size
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offsets % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, narrow(acc, out_ptr.dtype.element_ty), mask=mask)


# They take the same arguments; gemv is always exact.
KERNELS = {
    "gemv": w4a16_gemm_gemv_kernel,
    "tile": w4a16_gemm_tile_kernel,
}


def launch(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    layout: str,
    out: torch.Tensor,
) -> None:
    """Write the product to out [M, N]; arguments as in llmkern.ops.w4a16_gemm.

    Allocates float32 [SPLIT_K, M, N] where K is split.
    """
    M, K = x.shape
    N = out.shape[1]
    config = select_config(M, N, K, group_size, x.dtype == torch.float32, num_sms(x))
    target, target_bias = out, bias
    if config.SPLIT_K > 1:
        target = out.new_empty(config.SPLIT_K, M, N, dtype=torch.float32)
        target_bias = None
    # Every split begins at a tile.
    step = config.BLOCK_K // 8
    split_words = triton.cdiv(triton.cdiv(K // 8, step), config.SPLIT_K) * step
    tiles = triton.cdiv(M, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N)
    with on_device(x):
        KERNELS[config.kernel][(tiles, config.SPLIT_K)](
            x,
            qweight,
            scales,
            zeros,
            target_bias,
            target,
            M,
            N,
            K,
            x.stride(0),
            split_words,
            GROUP_SIZE=group_size,
            EXACT=config.EXACT,
            BLOCK_M=config.BLOCK_M,
            BLOCK_N=config.BLOCK_N,
            BLOCK_K=config.BLOCK_K,
            NUM_STAGES=config.num_stages,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
        if config.SPLIT_K > 1:
            w4a16_gemm_reduce_kernel[(triton.cdiv(M * N, 1024),)](
                target,
                bias,
                out,
                M * N,
                N,
                SPLIT_K=config.SPLIT_K,
                BLOCK=1024,
                num_warps=4,
                enable_fp_fusion=True,
            )
