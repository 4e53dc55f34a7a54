// lut4_gemm: out[m, n] = sum_k x[m, k] * w[n, k] + bias[n], w = scales * codebook[codes].
//
// Weights in the CUDA layout and 16-bit x: see lut4_tensor_core.cuh. Weights in the canonical
// layout, which a caller of the op may pass as they come from a file, and float32 x over these take
// the plain kernels of common/code_rows.cuh. Layouts: llmkern/formats/lut4.py and lut4_cuda.py.
//
// Not yet run on a GPU: tested in the emulator (csrc/emu) and compiled ahead of time only; the tile
// sizes and the switch at M = 8 are not tuned.

#include "cuda/common/code_rows.cuh"
#include "cuda/common/lut4.cuh"
#include "cuda/kernels.h"
#include "cuda/lut4_tensor_core.cuh"

namespace llmkern::cuda {

void lut4_gemm(const Lut4GemmParams& p, const ChunkConfig& config, void* stream) {
  dispatch(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (!std::is_same_v<T, float>) {
      if (p.w.layout == Layout::kCuda) return lut4_tensor_core<T>(p, config, stream);
    }
    code_gemm<T>("lut4_gemm", p, stream);
  });
}

}  // namespace llmkern::cuda
