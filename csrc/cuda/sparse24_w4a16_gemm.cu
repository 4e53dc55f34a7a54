// sparse24_w4a16_gemm: out[m, n] = sum_k x[m, k] * w[n, k] + bias[n], w 2:4 sparse, what is kept
// being scales * (codes - zeros) in 4 bits.
//
// Three bits per dense weight and its share of a scale: half the products of a dense weight and
// less than a fifth of its bytes. Weights are operand A of mma.sp m16n8k32, unpacked in registers.
// Up to a few hundred rows of x (common/chunk_gemm.cuh) the tensor core sums products with the
// exact integers code - zero and each group's sum is scaled in float32; above (128 x 128 tiles of
// out, common/sparse24_tile.cuh) each weight is scaled in float32 and rounded to x's type once.
//
// Not yet run on a GPU: tested in the emulator (csrc/emu) and compiled ahead of time only; tiles,
// ring depths and tiers are not tuned. Source: Sparse-MARLIN (arXiv 2408.11743) for 4-bit codes
// inside 2:4 on mma.sp.

#include "cuda/common/sparse24_tile.cuh"

namespace llmkern::cuda {

void sparse24_w4a16_gemm(const Sparse24W4A16GemmParams& p, const ChunkConfig& config,
                         void* stream) {
  const ChunkGemmParams common = {p.x, p.qvalues, p.bias, p.out, p.M, p.N, p.K, p.x_stride};
  sparse24(common, p.dtype, Sparse24Int4Format(p), config, stream);
}

}  // namespace llmkern::cuda
