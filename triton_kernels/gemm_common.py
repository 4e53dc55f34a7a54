"""Product with a packed weight, out[m, n] = sum_k x[m, k] * w[n, k] + bias[n]: what its formats share.

w[n, k] = scales[n, k // group_size] * value[n, k]. A word is what holds 8 consecutive k of a row; a
format gives four device functions:

    LOAD_PARAMS(param_ptr, rows, groups, num_groups, mask)   what decoding takes, in mask's shape,
                                  which broadcasts against words
    LOAD_WORDS(weight_ptr, offsets, mask, params)   words at their numbers n * K / 8 + k / 8, int32 or
                                  whatever the next two take; zeros where mask is not set
    PLANE(words, params, i)       float32 values of k = 8 j + i of every word, in words' shape
    TILE(words, params, DTYPE)    all of them: words [N, W] to values [N, 8 W]

Two kernels read the weight, at small M bound by that stream, at large M by the tensor cores:

gemv  multiply-adds, no tensor core; every product exact in float32. A program serves all rows of x that
      its BLOCK_M holds with one load of the weight.
tile  acc[n, m] = W[n, k] @ xT[k, m]: the weight is the left operand, so that it reaches the tensor core
      from registers and a small M pads the narrow side of the instruction. A tile of W lies in one
      group. SCALE_SUMS multiplies values in x's dtype and scales each group's sum in float32; otherwise
      the weight is scaled and rounded to x's dtype once. float32 x never goes through TF32.

A tall K is split over programs where N alone does not fill the GPU. The partial sums are added in a
fixed order, so results repeat bit for bit.

Run in Triton's interpreter and compiled ahead of time for sm_80 and sm_90; not yet run on a GPU.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from .configs import Config
from .device import on_device
from .numerics import dot, narrow


@triton.jit
def tile_of_program(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows of w (int64), and the first row of x, that this program multiplies.

    Eight blocks of rows of w share each tile of x while it lies in L2.
    """
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks_m = tl.cdiv(M, BLOCK_M)
    band = tl.program_id(0) // (8 * blocks_m)
    band_rows = tl.minimum(blocks_n - band * 8, 8)
    within = tl.program_id(0) % (8 * blocks_m)
    rows = ((band * 8 + within % band_rows) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    return rows, (within // band_rows) * BLOCK_M


@triton.jit
def words_of_split(K, split_words):
    """First word of a row that this program reads, and the one after its last."""
    first = tl.program_id(1) * split_words
    return first, tl.minimum(first + split_words, K // 8)


@triton.jit
def load_words(weight_ptr, offsets, mask, params):
    """LOAD_WORDS of formats that keep 8 codes in an int32."""
    return tl.load(weight_ptr + offsets, mask=mask, other=0)


@triton.jit
def load_scales(scales_ptr, rows, groups, num_groups, mask):
    """Scales of `rows` in `groups` as float32; 1 where scales_ptr is None."""
    if scales_ptr is None:
        return tl.full(mask.shape, 1.0, tl.float32)
    else:  # without it, the compiler would go on to what follows a return
        return tl.load(scales_ptr + rows * num_groups + groups, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_octets(x_ptr, offset, words, mask):
    """The 8 values of x at each of `words`, as 8 float32 tensors; rows of x are aligned to 8 bytes.

    Loaded 8 bytes at a time: single values of 16 bits would make as many loads as multiply-adds.
    """
    BITS: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth
    KIND: tl.constexpr = tl.int16 if BITS == 16 else tl.int32
    EACH: tl.constexpr = 64 // BITS
    ptrs = x_ptr.to(tl.pointer_type(tl.int64), bitcast=True) + offset // EACH + words * (8 // EACH)
    values = ()
    for i in tl.static_range(8 // EACH):
        packed = tl.load(ptrs + i, mask=mask, other=0)
        for j in tl.static_range(EACH):
            bits = (packed >> (j * BITS)).to(KIND)
            value = bits.to(x_ptr.dtype.element_ty, bitcast=True)
            values += (value.to(tl.float32),)
    return values


@triton.jit
def store_tile(acc, out_ptr, bias_ptr, rows, cols, M, N):
    """acc [n, m] of this split to out[split, m, n], with the bias."""
    mask = (rows < N)[:, None] & (cols < M)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    offsets = (tl.program_id(1) * M + cols.to(tl.int64))[None, :] * N + rows[:, None]
    tl.store(out_ptr + offsets, narrow(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gemv_kernel(
    x_ptr,
    weight_ptr,
    scales_ptr,
    param_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_xm,
    split_words,
    GROUP_SIZE: tl.constexpr,
    LOAD_PARAMS: tl.constexpr,
    LOAD_WORDS: tl.constexpr,
    PLANE: tl.constexpr,
    TILE: tl.constexpr,
    SCALE_SUMS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """BLOCK_K is cut into spans that lie in one group each. TILE is not called, EVEN_K not asked."""
    rows, first_m = tile_of_program(M, N, BLOCK_M, BLOCK_N)
    first, last = words_of_split(K, split_words)
    num_groups = K // GROUP_SIZE
    SPAN: tl.constexpr = min(BLOCK_K, GROUP_SIZE & -GROUP_SIZE) // 8  # words
    SPANS: tl.constexpr = BLOCK_K // 8 // SPAN
    rows_w = rows[:, None, None]
    mask_n = rows_w < N
    sums = ()  # of each row of x
    for _ in tl.static_range(BLOCK_M):
        sums += (tl.zeros((BLOCK_N, SPANS, SPAN), tl.float32),)
    for start in tl.range(first, last, SPANS * SPAN, num_stages=NUM_STAGES):
        spans = start + tl.arange(0, SPANS) * SPAN
        offs_w = spans[:, None] + tl.arange(0, SPAN)[None, :]
        mask_w = offs_w < last  # [SPANS, SPAN]
        groups = (spans // (GROUP_SIZE // 8))[None, :, None]
        mask = mask_n & (spans < last)[None, :, None]
        params = LOAD_PARAMS(param_ptr, rows_w, groups, num_groups, mask)
        offsets = rows_w * (K // 8) + offs_w[None, :, :]
        mask_words = mask_n & mask_w[None, :, :]
        words = LOAD_WORDS(weight_ptr, offsets, mask_words, params)  # [BLOCK_N, SPANS, SPAN]
        scales = load_scales(scales_ptr, rows_w, groups, num_groups, mask)
        for i in tl.static_range(BLOCK_M):
            # Rows beyond the last are computed as the last one, and not stored.
            row = tl.minimum(first_m + i, M - 1).to(tl.int64)
            x = load_octets(x_ptr, row * stride_xm, offs_w, mask_w)
            part = tl.zeros((BLOCK_N, SPANS, SPAN), tl.float32)
            for plane in tl.static_range(8):
                part = tl.fma(PLANE(words, params, plane), x[plane][None, :, :], part)
            sums = sums[:i] + (tl.fma(scales, part, sums[i]),) + sums[i + 1 :]  # noqa: RUF005 (jit)
    for i in tl.static_range(BLOCK_M):
        acc = tl.sum(tl.sum(sums[i], axis=2), axis=1)[:, None]
        store_tile(acc, out_ptr, bias_ptr, rows, first_m + i + tl.arange(0, 1), M, N)


@triton.jit
def tile_kernel(
    x_ptr,
    weight_ptr,
    scales_ptr,
    param_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_xm,
    split_words,
    GROUP_SIZE: tl.constexpr,
    LOAD_PARAMS: tl.constexpr,
    LOAD_WORDS: tl.constexpr,
    PLANE: tl.constexpr,
    TILE: tl.constexpr,
    SCALE_SUMS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Every K in the split is whole tiles, but for the last where not EVEN_K; PLANE is not called."""
    rows, first_m = tile_of_program(M, N, BLOCK_M, BLOCK_N)
    cols = first_m + tl.arange(0, BLOCK_M)
    rows_w = rows[:, None]
    mask_n = rows_w < N
    mask_m = cols < M
    num_groups = K // GROUP_SIZE
    dtype = x_ptr.dtype.element_ty
    first, last = words_of_split(K, split_words)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in tl.range(first, last, BLOCK_K // 8, num_stages=NUM_STAGES):
        offs_w = start + tl.arange(0, BLOCK_K // 8)
        offs_k = start * 8 + tl.arange(0, BLOCK_K)
        mask_w, mask_x = mask_n, mask_m[None, :]
        if not EVEN_K:
            mask_w = mask_w & (offs_w < last)[None, :]
            mask_x = mask_x & (offs_k < K)[:, None]
        group = start // (GROUP_SIZE // 8)
        params = LOAD_PARAMS(param_ptr, rows_w, group, num_groups, mask_n)
        offsets = rows_w * (K // 8) + offs_w[None, :]
        words = LOAD_WORDS(weight_ptr, offsets, mask_w, params)  # [BLOCK_N, BLOCK_K / 8]
        x = tl.load(
            x_ptr + cols.to(tl.int64)[None, :] * stride_xm + offs_k[:, None], mask=mask_x, other=0.0
        )  # [BLOCK_K, BLOCK_M]
        scales = load_scales(scales_ptr, rows_w, group, num_groups, mask_n)
        if scales_ptr is None:
            acc = dot(TILE(words, params, dtype), x, acc)
        elif SCALE_SUMS:
            acc = tl.fma(scales, dot(TILE(words, params, dtype), x, tl.zeros_like(acc)), acc)
        else:
            acc = dot(narrow(scales * TILE(words, params, tl.float32), dtype), x, acc)
    store_tile(acc, out_ptr, bias_ptr, rows, cols, M, N)


@triton.jit
def reduce_kernel(
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


# They take the same arguments.
KERNELS = {"gemv": gemv_kernel, "tile": tile_kernel}


def run(
    config: Config,
    decoder: Mapping[str, Any],
    x: torch.Tensor,
    weight: torch.Tensor | tuple[torch.Tensor, ...],
    scales: torch.Tensor | None,
    params: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    out: torch.Tensor,
) -> None:
    """Write the product to out [M, N]; `decoder` has the format's functions.

    LOAD_WORDS is load_words unless it is there, and `weight` what it takes.

    Allocates float32 [SPLIT_K, M, N] where K is split.
    """
    M, K = x.shape
    N = out.shape[1]
    # Every split begins at a tile, and none is empty.
    step = config.BLOCK_K // 8
    split_words = triton.cdiv(triton.cdiv(K // 8, step), config.SPLIT_K) * step
    splits = triton.cdiv(K // 8, split_words)
    if config.kernel == "gemv" and (x.data_ptr() % 8 or x.stride(0) * x.element_size() % 8):
        x = x.clone(memory_format=torch.contiguous_format)
    target, target_bias = out, bias
    if splits > 1:
        target = out.new_empty(splits, M, N, dtype=torch.float32)
        target_bias = None
    tiles = triton.cdiv(M, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N)
    with on_device(x):
        KERNELS[config.kernel][(tiles, splits)](
            x,
            weight,
            scales,
            params,
            target_bias,
            target,
            M,
            N,
            K,
            x.stride(0),
            split_words,
            GROUP_SIZE=group_size,
            SCALE_SUMS=config.SCALE_SUMS,
            EVEN_K=K % config.BLOCK_K == 0,
            BLOCK_M=config.BLOCK_M,
            BLOCK_N=config.BLOCK_N,
            BLOCK_K=config.BLOCK_K,
            NUM_STAGES=config.num_stages,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
            **{"LOAD_WORDS": load_words, **decoder},
        )
        if splits > 1:
            reduce_kernel[(triton.cdiv(M * N, 1024),)](
                target,
                bias,
                out,
                M * N,
                N,
                SPLIT_K=splits,
                BLOCK=1024,
                num_warps=4,
                enable_fp_fusion=True,
            )
