// dequantize_int4: w[n, k] = scales[n, g] * (codes[n, k] - zeros[n, g]), g = k / group_size.
// Layouts: llmkern/formats/int4.py and int4_cuda.py.
//
// Not yet run on a GPU: tested in the emulator (csrc/emu) and compiled ahead of time only.

#include "cuda/common/dequant.cuh"
#include "cuda/common/dequantize.cuh"
#include "cuda/common/int4.cuh"
#include "cuda/kernels.h"

namespace llmkern::cuda {
namespace {

struct ReadInt4Chunk {
  static __device__ __forceinline__ void read(const Int4Weight& w, int64_t n, int64_t k,
                                              float (&value)[8]) {
    const Int4Chunks shape = int4_chunks(w);
    const int row = static_cast<int>(n % kChunkRows), column = static_cast<int>(k % kChunkColumns);
    const auto* chunk = static_cast<const unsigned char*>(w.qweight) +
                        (n / kChunkRows * shape.per_row + k / kChunkColumns) * shape.bytes;
    const int at = column / shape.group_size * kChunkRows + grid_index(row);
    const float scale = load_as(chunk + kCodeBytes, at, w.scales_dtype);
    const float zero = w.zeros ? static_cast<float>(chunk[shape.zeros_at + at]) : 8.0f;
    const ChunkPlace place = chunk_place(row, column);
    const auto* words = reinterpret_cast<const uint32_t*>(chunk) + place.word;
#pragma unroll
    for (int t = 0; t < 4; t++) {
      const uint32_t shifted = words[t * 4] >> (4 * place.pair);
      value[2 * t] = scale * (static_cast<float>(shifted & 15) - zero);
      value[2 * t + 1] = scale * (static_cast<float>(shifted >> 16 & 15) - zero);
    }
  }
};

}  // namespace

void dequantize_int4(const DequantizeInt4Params& p, void* stream) {
  dequantize<ReadInt4Chunk>("dequantize_int4", p, stream);
}

}  // namespace llmkern::cuda
