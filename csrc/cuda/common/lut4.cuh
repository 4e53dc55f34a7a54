// Reading a weight of codes into a book: in the canonical layout (llmkern/formats/lut4.py), and
// where the parts of a chunk of the CUDA layout lie (lut4_cuda.py).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/chunks.cuh"
#include "cuda/common/dtype.cuh"
#include "llmkern.h"

namespace llmkern::cuda {

struct Lut4Chunks {
  int64_t per_row;  // chunks that follow each other along K
  int bytes;        // of one chunk
  int group_size;   // columns per scale and, if groups have books, per book: 32, 64 or 128
  int books_at;     // byte offset of the groups' books, 16 floats each; 0: there are none
};

inline __host__ __device__ Lut4Chunks lut4_chunks(const Lut4Weight& w) {
  const int group_size = inline_group_size(w.group_size);
  const int grids = kChunkRows * (kChunkColumns / group_size);
  const int scale_bytes = w.scales ? (w.scales_dtype == DType::kFloat32 ? 4 : 2) : 0;
  const int books_at = kCodeBytes + grids * scale_bytes;
  const bool books = w.book_group_stride != 0;
  return {(w.K + kChunkColumns - 1) / kChunkColumns, books_at + (books ? grids * 64 : 0),
          group_size, books ? books_at : 0};
}

__device__ __forceinline__ float load_scale(const Lut4Weight& w, int64_t n, int64_t g) {
  return w.scales ? load_as(w.scales, n * (w.K / w.group_size) + g, w.scales_dtype) : 1.0f;
}

__device__ __forceinline__ const float* book_of(const Lut4Weight& w, int64_t n, int64_t g) {
  return w.codebook + n * w.book_row_stride + g * w.book_group_stride;
}

// As code_rows.cuh describes it. A lane keeps its own copy of the book in shared memory, all of it
// in one bank, so that 32 lanes look up 32 different codes, of as many books if each group has one,
// in one access.
template <typename Weight>
struct CodeRows;

template <>
struct CodeRows<Lut4Weight> {
  static constexpr int kBookEntries = 16;
  struct Group {
    float scale;
  };

  static __device__ __forceinline__ void copy_book(float* to, const float* book) {
#pragma unroll
    for (int i = 0; i < 16; i++) to[32 * i] = book[i];
  }
  static __device__ __forceinline__ void enter_row(const Lut4Weight& w, float* book, int64_t n) {
    if (!w.book_group_stride) copy_book(book, book_of(w, n, 0));
  }
  static __device__ __forceinline__ Group enter_group(const Lut4Weight& w, float* book, int64_t n,
                                                      int64_t g) {
    if (w.book_group_stride) copy_book(book, book_of(w, n, g));
    return {load_scale(w, n, g)};
  }
  static __device__ __forceinline__ void decode(uint32_t word, const Group&, const float* book,
                                                float (&out)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] = book[(word >> (4 * i) & 15) * 32];
  }
  static __device__ __forceinline__ void decode_scaled(const Lut4Weight& w, int64_t n, int64_t g,
                                                       uint32_t word, float (&out)[8]) {
    const float scale = load_scale(w, n, g);
    const float* book = book_of(w, n, g);
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] = scale * book[word >> (4 * i) & 15];
  }
};

}  // namespace llmkern::cuda
