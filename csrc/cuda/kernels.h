// Launch functions of the CUDA kernels. `stream` is a cudaStream_t of the current device; nothing
// is synchronized or allocated. A failed launch throws std::runtime_error.
#pragma once

#include "llmkern.h"

namespace llmkern::cuda {

void w4a16_gemm(const W4A16GemmParams& p, void* stream);
void dequantize_int4(const DequantizeInt4Params& p, void* stream);
void hessian_update(const HessianUpdateParams& p, void* stream);
void obs_quantize_block(const ObsBlockParams& p, void* stream);

}  // namespace llmkern::cuda
