"""sparse24_gemm: out[m, n] = sum_k x[m, k] * w[n, k] + bias[n], w 2:4 sparse in the canonical layout.

1.125 bytes are read per weight of 16 bits, where a dense weight has 2. The kept values are put in their
places in registers (sparse24.py) and multiplied as a dense weight is (gemm_common.py), so what is won is
the bandwidth, at small M; for the arithmetic that sparsity saves see the CUDA backend. configs.json has
the choice of tiles: 16-bit x goes through the tensor cores at any M.

Run in Triton's interpreter and compiled ahead of time for sm_80 and sm_90; not yet run on a GPU, so the
limits between the tiers are estimates.
"""

import torch

from . import configs, gemm_common
from .device import DEFAULT_SMS, num_sms
from .sparse24 import load_values, no_params, value_plane, value_tile

DECODER = {
    "LOAD_PARAMS": no_params,
    "LOAD_WORDS": load_values,
    "PLANE": value_plane,
    "TILE": value_tile,
}
NO_GROUPS = 1 << 16  # a power of two: no tile is cut down to lie in one group


def select_config(
    M: int, N: int, K: int, float32: bool, num_sms: int = DEFAULT_SMS
) -> configs.Config:
    """Kernel and tile for a shape; `float32` is whether x is."""
    return configs.select_config("sparse24_gemm", M, N, K, NO_GROUPS, float32, num_sms)


def launch(
    x: torch.Tensor,
    values: torch.Tensor,
    meta: torch.Tensor,
    bias: torch.Tensor | None,
    layout: str,
    out: torch.Tensor,
    config: configs.Config | None = None,
) -> None:
    """Write the product to out [M, N]; arguments as in llmkern.ops.sparse24_gemm.

    `config` stands in for the table's.
    """
    if config is None:
        (M, K), N = x.shape, out.shape[1]
        config = select_config(M, N, K, x.dtype == torch.float32, num_sms(x))
    if values.data_ptr() % 8:  # four values are read at a time
        values = values.clone()
    group_size = config.BLOCK_K
    gemm_common.run(config, DECODER, x, (values, meta), None, None, bias, group_size, out)
