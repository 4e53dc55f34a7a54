// sparse24_gemm: out[m, n] = sum_k x[m, k] * w[n, k] + bias[n], w 2:4 sparse in 16 bits.
//
// Of every four weights two are stored, with four bits that say which: 1.125 bytes per weight
// instead of 2, and half the products. Weights are operand A of mma.sp m16n8k32, in the order of
// its fragments (llmkern/formats/sparse24_cuda.py). Up to a few hundred rows of x the weight's
// bytes are the bound: the ring of common/chunk_gemm.cuh. Above, arithmetic is: 128 x 128 tiles of
// out, common/sparse24_tile.cuh. Everything is summed in float32, in a fixed order.
//
// Not yet run on a GPU: tested in the emulator (csrc/emu) and compiled ahead of time only; tiles,
// ring depths and tiers are not tuned. wgmma's sparse form is left out until there is a GPU to
// write it against. Source: "Accelerating Sparse Deep Neural Networks" (arXiv 2104.08378) for the
// format; the PTX ISA for mma.sp.

#include "cuda/common/sparse24_tile.cuh"

namespace llmkern::cuda {

void sparse24_gemm(const Sparse24GemmParams& p, const ChunkConfig& config, void* stream) {
  const ChunkGemmParams common = {p.x, p.values, p.bias, p.out, p.M, p.N, p.K, p.x_stride};
  sparse24(common, p.dtype, Sparse24Format(), config, stream);
}

}  // namespace llmkern::cuda
