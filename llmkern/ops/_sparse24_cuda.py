"""How 2:4 sparse weights in the cuda layout are multiplied: the choice of a tier, and the launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern import _backends
from llmkern.formats.sparse24_cuda import is_symmetric
from llmkern.ops._library import DTYPE_CODES, pointer
from llmkern.ops._w4a16_config import MAX_DECODE_ROWS, Config, decode_config

# From 257 rows on, 128 x 128 tiles of y, where these are enough for every multiprocessor of an A100 or
# H100: they read a weight once per 128 rows and x once per 128 columns, but less of them run at once.
# By calculation, not measured.
MAX_SMALL_TILE_ROWS = 256
_LARGE_TILE = 128
_SMS = {True: 132, False: 108}


def select_config(M: int, N: int, K: int, sm: int) -> Config:
    """The tier and its tile. Within a tier the order of every sum follows from N, K and sm alone.

    Args:
        M: rows of x.
        N: columns of the product.
        K: columns of x.
        sm: compute capability, 80 for 8.0.

    Returns:
        A config; its tier is "decode", "tile" (64 x 64) or "large" (128 x 128). Not yet tuned on a GPU.
    """
    bulk = sm >= 90
    if M <= MAX_DECODE_ROWS:
        return decode_config(M, N, K, bulk)
    large = -(-M // _LARGE_TILE) * -(-N // _LARGE_TILE)
    if M > MAX_SMALL_TILE_ROWS and large >= _SMS[bulk]:
        return Config("large", _LARGE_TILE)
    return Config("tile", 64, 1, bulk)


def refuse(x: Tensor, weight: Tensor, layout: str) -> str | None:
    """Why the compiled CUDA kernels cannot serve a product, or None."""
    if reason := _backends.refuse_cuda(x.device):
        return reason
    if layout != "cuda":
        return f"the weight is in the {layout} layout"
    if x.dtype == torch.float32:
        return "x is float32"
    if weight.data_ptr() % 16:
        return "the weight is not 16-byte aligned"
    return None


def launch_values(x: Tensor, values: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x wᵀ + bias for 16-bit values; as sparse24_gemm has them."""
    _launch("sparse24_gemm", x, values, bias, out)


def launch_codes(
    x: Tensor,
    qvalues: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    group_size: int,
    out: Tensor,
) -> None:
    """out = x wᵀ + bias for 4-bit codes; as sparse24_w4a16_gemm has them."""
    zeros = not is_symmetric(qvalues, scales, group_size)
    grids = (group_size, DTYPE_CODES[scales.dtype], zeros)
    _launch("sparse24_w4a16_gemm", x, qvalues, bias, out, *grids)


def _launch(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *grids: Any
) -> None:
    (M, K), N = x.shape, out.shape[1]
    config = select_config(M, N, K, _backends.cuda_capability(x.device))
    if x.data_ptr() % 16 or x.stride(0) % 8:
        x = x.clone(memory_format=torch.contiguous_format)  # is copied in 16-byte pieces
    workspace = None
    if config.split > 1 and not config.bulk:
        workspace = x.new_empty((config.split, M, N), dtype=torch.float32)
    module, _ = _backends.compiled_module("_cuda")
    assert module is not None
    getattr(module, op)(
        pointer(x),
        pointer(weight),
        pointer(bias),
        pointer(out),
        M,
        N,
        K,
        x.stride(0),
        DTYPE_CODES[x.dtype],
        *grids,
        config.rows,
        config.split,
        config.bulk,
        pointer(workspace),
        *_backends.cuda_queue(x.device),
    )
