// Launch functions of the CUDA kernels. `stream` is a cudaStream_t of the current device; nothing
// is synchronized or allocated. A failed launch throws std::runtime_error.
#pragma once

#include "llmkern.h"

namespace llmkern::cuda {

// How a weight in a CUDA layout is multiplied; chosen by llmkern/ops/_w4a16_config.py.
struct ChunkConfig {
  int rows;          // of x per CTA: 8, 16, 32 or 64
  int split;         // slices of K
  bool bulk;         // bulk copies, clusters and programmatic launch: sm_90 and newer
  float* workspace;  // [split, M, N]; null if split is 1 or bulk
};

void w4a16_gemm(const W4A16GemmParams& p, const ChunkConfig& config, void* stream);
void dequantize_int4(const DequantizeInt4Params& p, void* stream);
// Above M = 8, 16-bit x and its row stride are in 16-byte pieces; only the canonical layout.
void lut4_gemm(const Lut4GemmParams& p, void* stream);
void hessian_update(const HessianUpdateParams& p, void* stream);
void obs_quantize_block(const ObsBlockParams& p, void* stream);

}  // namespace llmkern::cuda
