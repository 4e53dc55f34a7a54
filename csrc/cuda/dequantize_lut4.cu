// dequantize_lut4: w[n, k] = scales[n, g] * codebook[.., codes[n, k]], g = k / group_size.
// Layouts: llmkern/formats/lut4.py and lut4_cuda.py.
//
// Not yet run on a GPU: tested in the emulator (csrc/emu) and compiled ahead of time only.

#include "cuda/common/dequantize.cuh"
#include "cuda/common/lut4.cuh"
#include "cuda/kernels.h"

namespace llmkern::cuda {
namespace {

struct ReadLut4Chunk {
  static __device__ __forceinline__ void read(const Lut4Weight& w, int64_t n, int64_t k,
                                              float (&value)[8]) {
    const Lut4Chunks shape = lut4_chunks(w);
    const int row = static_cast<int>(n % kChunkRows), column = static_cast<int>(k % kChunkColumns);
    const auto* chunk = static_cast<const unsigned char*>(w.qweight) +
                        (n / kChunkRows * shape.per_row + k / kChunkColumns) * shape.bytes;
    const int group = column / shape.group_size;
    float scale = 1.0f;
    if (w.scales)
      scale = load_as(chunk + kCodeBytes, group * kChunkRows + grid_index(row), w.scales_dtype);
    const float* book = w.codebook + n * w.book_row_stride;
    if (shape.books_at)
      book =
          reinterpret_cast<const float*>(chunk + shape.books_at) + (group * kChunkRows + row) * 16;
    const ChunkPlace place = chunk_place(row, column);
    const auto* words = reinterpret_cast<const uint32_t*>(chunk) + place.word;
#pragma unroll
    for (int t = 0; t < 4; t++) {
      const uint32_t pair = words[t * 4] >> (8 * place.pair) & 255;
      value[2 * t] = scale * book[pair & 15];
      value[2 * t + 1] = scale * book[pair >> 4];
    }
  }
};

}  // namespace

void dequantize_lut4(const DequantizeLut4Params& p, void* stream) {
  dequantize<ReadLut4Chunk>("dequantize_lut4", p, stream);
}

}  // namespace llmkern::cuda
