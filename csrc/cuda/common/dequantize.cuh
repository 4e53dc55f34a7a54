// Dense weights from 4-bit codes: what dequantize_int4 and dequantize_lut4 share.
//
// Bound by memory: 0.5 byte read and one element written per weight. A thread decodes one word,
// eight codes, and stores them in 16-byte pieces; a CTA covers 2048 columns of one row, so that no
// thread divides by K.
#pragma once

#include <type_traits>

#include "cuda/common/code_rows.cuh"
#include "cuda/common/dtype.cuh"
#include "cuda/common/launch.h"

namespace llmkern::cuda {

constexpr int kDequantizeThreads = 256;

// Where a chunk of the CUDA layout holds columns k .. k + 7 (k in the chunk) of a row of it: two
// values in each of four lanes' words, which lie four words apart, at the pair `pair` of them.
struct ChunkPlace {
  int word, pair;
};

__device__ __forceinline__ ChunkPlace chunk_place(int row, int k) {
  const int step = k / 16;
  return {((step / 4 * 4 + row / 16) * 32 + row % 8 * 4) * 4 + step % 4,
          row % 16 / 8 + k % 16 / 8 * 2};
}

// ReadChunk: a struct with void read(w, n, k, q), columns k .. k + 7 of row n, scaled.
template <typename T, typename ReadChunk, typename Params>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_kernel(const Params p, const unsigned ctas_per_row) {
  using Weight = std::decay_t<decltype(p.w)>;
  const Weight& w = p.w;
  const int64_t words = w.K / 8;
  const int64_t n = blockIdx.x / ctas_per_row;
  const int64_t word =
      static_cast<int64_t>(blockIdx.x % ctas_per_row) * kDequantizeThreads + threadIdx.x;
  if (word >= words) return;
  float value[8];
  if (w.layout == decltype(w.layout)::kCuda)
    ReadChunk::read(w, n, word * 8, value);
  else
    CodeRows<Weight>::decode_scaled(w, n, word * 8 / w.group_size,
                                    static_cast<const uint32_t*>(w.qweight)[n * words + word],
                                    value);
  // K is a multiple of 32 and `out` is 16-byte aligned, hence so is every eighth element.
  constexpr int kPerPiece = 16 / sizeof(T);
  T* out = static_cast<T*>(p.out) + n * w.K + word * 8;
#pragma unroll
  for (int piece = 0; piece < 8 / kPerPiece; piece++) {
    Bytes16 packed;
#pragma unroll
    for (int i = 0; i < kPerPiece; i++)
      store(reinterpret_cast<T*>(&packed) + i, value[piece * kPerPiece + i]);
    reinterpret_cast<Bytes16*>(out)[piece] = packed;
  }
}

template <typename ReadChunk, typename Params>
void dequantize(const char* op, const Params& p, void* stream) {
  const int64_t ctas_per_row = ceil_div(p.w.K / 8, kDequantizeThreads);
  dispatch(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(op, dequantize_kernel<T, ReadChunk, Params>, p.w.N * ctas_per_row, kDequantizeThreads,
           stream, p, static_cast<unsigned>(ctas_per_row));
  });
}

}  // namespace llmkern::cuda
