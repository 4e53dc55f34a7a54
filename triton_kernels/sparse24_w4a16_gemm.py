"""sparse24_w4a16_gemm: out[m, n] = sum_k x[m, k] * w[n, k] + bias[n], w 2:4 sparse, in 4 bits.

What is kept is scales[n, g] * (codes - zeros[n, g]); three bits are read per weight, and 2 to 4 bytes per
group. The kept codes are put in their places in registers (sparse24.py), which makes the words that
int4.py decodes; from there on all is as in w4a16_gemm.py: what is won is the bandwidth, at small M.
configs.json has the choice of tiles: 16-bit x goes through the tensor cores at any M.

Run in Triton's interpreter and compiled ahead of time for sm_80 and sm_90; not yet run on a GPU, so the
limits between the tiers are estimates.
"""

import torch

from . import configs, gemm_common
from .device import DEFAULT_SMS, num_sms
from .int4 import integer_tile, load_zeros, unpack_plane
from .sparse24 import load_codes

DECODER = {
    "LOAD_PARAMS": load_zeros,
    "LOAD_WORDS": load_codes,
    "PLANE": unpack_plane,
    "TILE": integer_tile,
}


def select_config(
    M: int, N: int, K: int, group_size: int, float32: bool, num_sms: int = DEFAULT_SMS
) -> configs.Config:
    """Kernel and tile for a shape; `float32` is whether x is."""
    return configs.select_config("sparse24_w4a16_gemm", M, N, K, group_size, float32, num_sms)


def launch(
    x: torch.Tensor,
    qvalues: torch.Tensor,
    meta: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    layout: str,
    out: torch.Tensor,
    config: configs.Config | None = None,
) -> None:
    """Write the product to out [M, N]; arguments as in llmkern.ops.sparse24_w4a16_gemm.

    `config` stands in for the table's; its tiles must lie in one group each.
    """
    if config is None:
        (M, K), N = x.shape, out.shape[1]
        config = select_config(M, N, K, group_size, x.dtype == torch.float32, num_sms(x))
    weight = qvalues.view(torch.int16), meta
    gemm_common.run(config, DECODER, x, weight, scales, zeros, bias, group_size, out)
