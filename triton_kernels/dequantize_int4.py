"""dequantize_int4: w[n, k] = scales[n, g] * (codes[n, k] - zeros[n, g]), canonical layout.

Bound by writing the result: half a byte is read per weight, 2 or 4 are written. A program makes one
[BLOCK_N, BLOCK_K] tile, which never straddles a group: each row has one scale and one zero point.

Run in Triton's interpreter and compiled ahead of time for sm_80 and sm_90; not yet run on a GPU.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .device import on_device
from .int4 import dequantize_tile, load_zeros


@dataclass(frozen=True)
class Config:
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int


def select_config(N: int, K: int, group_size: int) -> Config:
    """Tile of about 4096 weights; BLOCK_K is the largest power of two up to 128 dividing the group."""
    block_k = min(128, group_size & -group_size)
    return Config(4096 // block_k, block_k, 4)


@triton.jit
def dequantize_int4_kernel(
    qweight_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    N,
    K,
    GROUP_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Rows are the fast axis of the grid: it has no limit of 65535 programs there.
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    first = tl.program_id(1) * BLOCK_K
    group = first // GROUP_SIZE
    num_groups = K // GROUP_SIZE
    mask = rows < N
    offs_w = first // 8 + tl.arange(0, BLOCK_K // 8)
    words = tl.load(
        qweight_ptr + rows[:, None] * (K // 8) + offs_w[None, :], mask=mask[:, None], other=0
    )  # [BLOCK_N, BLOCK_K / 8]
    scales = tl.load(scales_ptr + rows * num_groups + group, mask=mask, other=0.0).to(tl.float32)
    zeros = load_zeros(zeros_ptr, rows, group, num_groups, mask)
    w = dequantize_tile(words, scales[:, None], zeros[:, None], out_ptr.dtype.element_ty)
    offs_k = first + tl.arange(0, BLOCK_K)
    tl.store(out_ptr + rows[:, None] * K + offs_k[None, :], w, mask=mask[:, None])


def launch(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    group_size: int,
    layout: str,
    out: torch.Tensor,
) -> None:
    """Write the dense weight to out [N, K]; arguments as in llmkern.ops.dequantize_int4."""
    N, K = out.shape
    if out.numel() == 0:
        return
    config = select_config(N, K, group_size)
    grid = (triton.cdiv(N, config.BLOCK_N), K // config.BLOCK_K)
    with on_device(out):
        dequantize_int4_kernel[grid](
            qweight,
            scales,
            zeros,
            out,
            N,
            K,
            GROUP_SIZE=group_size,
            BLOCK_N=config.BLOCK_N,
            BLOCK_K=config.BLOCK_K,
            num_warps=config.num_warps,
        )
