"""w4a16_gemm: out[m, n] = sum_k x[m, k] * w[n, k] + bias[n], 4-bit integer w in the canonical layout.

w[n, k] = scales[n, g] * (codes[n, k] - zeros[n, g]). Half a byte is read per weight, and 2 to 4 bytes per
group. gemm_common.py has the kernels, int4.py the decoding, configs.json the choice of tiles. Up to M =
64 the tensor cores multiply the exact integers code - zero; above, weights that are rounded once.

Run in Triton's interpreter and compiled ahead of time for sm_80 and sm_90; not yet run on a GPU, so the
limits between the tiers are estimates.
"""

import torch

from . import configs, gemm_common
from .device import DEFAULT_SMS, num_sms
from .int4 import integer_tile, load_zeros, unpack_plane

DECODER = {"LOAD_PARAMS": load_zeros, "PLANE": unpack_plane, "TILE": integer_tile}


def select_config(
    M: int, N: int, K: int, group_size: int, float32: bool, num_sms: int = DEFAULT_SMS
) -> configs.Config:
    """Kernel and tile for a shape; `float32` is whether x is."""
    return configs.select_config("w4a16_gemm", M, N, K, group_size, float32, num_sms)


def launch(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    layout: str,
    out: torch.Tensor,
    config: configs.Config | None = None,
) -> None:
    """Write the product to out [M, N]; arguments as in llmkern.ops.w4a16_gemm.

    `config` stands in for the table's; its tiles must lie in one group each.
    """
    if config is None:
        (M, K), N = x.shape, out.shape[1]
        config = select_config(M, N, K, group_size, x.dtype == torch.float32, num_sms(x))
    gemm_common.run(config, DECODER, x, qweight, scales, zeros, bias, group_size, out)
