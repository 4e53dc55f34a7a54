"""lut4_gemm: out[m, n] = sum_k x[m, k] * w[n, k] + bias[n], w by a book of 16 values.

w[n, k] = scales[n, g] * book[codes[n, k]], codes in the canonical layout of llmkern/formats/int4.py; one
book per tensor, row or group. gemm_common.py has the kernels, lut4.py the look-up, configs.json the
choice of tiles. gemv multiplies the book's float32 entries; tile rounds them to x's dtype, and scales
each group's sum up to M = 64, each weight above.

Run in Triton's interpreter and compiled ahead of time for sm_80 and sm_90; not yet run on a GPU, so the
limits between the tiers are estimates.
"""

import torch

from . import configs, gemm_common
from .device import DEFAULT_SMS, num_sms
from .lut4 import book_plane, book_tile, load_group_book, load_row_book, load_tensor_book

# By the dimensions of the book.
LOAD_BOOK = {1: load_tensor_book, 2: load_row_book, 3: load_group_book}


def select_config(
    M: int, N: int, K: int, group_size: int, float32: bool, num_sms: int = DEFAULT_SMS
) -> configs.Config:
    """Kernel and tile for a shape; `float32` is whether x is."""
    return configs.select_config("lut4_gemm", M, N, K, group_size, float32, num_sms)


def launch(
    x: torch.Tensor,
    qweight: torch.Tensor,
    codebook: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    layout: str,
    out: torch.Tensor,
    config: configs.Config | None = None,
) -> None:
    """Write the product to out [M, N]; arguments as in llmkern.ops.lut4_gemm.

    `config` stands in for the table's; its tiles must lie in one group each.
    """
    if config is None:
        (M, K), N = x.shape, out.shape[1]
        config = select_config(M, N, K, group_size, x.dtype == torch.float32, num_sms(x))
    decoder = {"LOAD_PARAMS": LOAD_BOOK[codebook.dim()], "PLANE": book_plane, "TILE": book_tile}
    gemm_common.run(config, decoder, x, qweight, scales, codebook, bias, group_size, out)
