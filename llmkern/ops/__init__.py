"""The kernels as torch ops: public functions with checked arguments, one file per op."""

from llmkern.ops._hessian_factor import HessianFactor, factorize_hessian
from llmkern.ops._rounding import round_to_nearest
from llmkern.ops.dequantize_int4 import dequantize_int4
from llmkern.ops.dequantize_lut4 import dequantize_lut4
from llmkern.ops.dequantize_sparse24 import dequantize_sparse24
from llmkern.ops.hessian_update import hessian_update
from llmkern.ops.kd_loss import KdLoss, kd_loss
from llmkern.ops.lut4_gemm import lut4_gemm
from llmkern.ops.obs_prune import PruneResult, obs_prune
from llmkern.ops.obs_prune_columns import ColumnPruneResult, obs_prune_columns
from llmkern.ops.obs_quantize import ObsResult, obs_quantize, quantize_grid
from llmkern.ops.sparse24_gemm import sparse24_gemm
from llmkern.ops.sparse24_w4a16_gemm import sparse24_w4a16_gemm
from llmkern.ops.w4a16_gemm import w4a16_gemm

# Ops whose row is complete: a kernel in every backend. dequantize_lut4 needs none on a GPU,
# dequantize_sparse24 none at all, and kd_loss is torch's products around one Triton kernel.
OPS = (
    "dequantize_int4",
    "hessian_update",
    "lut4_gemm",
    "obs_prune",
    "obs_quantize",
    "sparse24_gemm",
    "sparse24_w4a16_gemm",
    "w4a16_gemm",
)

__all__ = [
    "OPS",
    "ColumnPruneResult",
    "HessianFactor",
    "KdLoss",
    "ObsResult",
    "PruneResult",
    "dequantize_int4",
    "dequantize_lut4",
    "dequantize_sparse24",
    "factorize_hessian",
    "hessian_update",
    "kd_loss",
    "lut4_gemm",
    "obs_prune",
    "obs_prune_columns",
    "obs_quantize",
    "quantize_grid",
    "round_to_nearest",
    "sparse24_gemm",
    "sparse24_w4a16_gemm",
    "w4a16_gemm",
]
