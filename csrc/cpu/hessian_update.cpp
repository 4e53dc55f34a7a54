// Lower triangle of H += alpha * xᵀx in float32, T * K * (K + 1) flops: half of a full product.
//
// x is converted and packed, kFlush rows at a time, into strips of kRows columns, strip[t][kRows];
// both operands of update_tile are read from there. A thread takes kBlock x kBlock blocks of H on
// or below the diagonal, sums them in its cache and adds them to H once per kFlush rows.
//
// Precision: products of bfloat16 or float16 are exact in float32. A sum runs over kChunk rows in
// registers, then kFlush / kChunk of those, then T / kFlush of those in H, so that its error grows
// with the square root of their lengths, not of T. alpha multiplies the finished sums, in float64.
#include <cstring>

#include "cpu/common/tile.h"
#include "cpu/convert.h"
#include "cpu/kernels.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int64_t kFlush = 2048;
constexpr int64_t kBlockStrips = 128 / kRows;
constexpr int64_t kBlock = kBlockStrips * kRows;

// Columns [s * kRows, ...) of rows [t0, t1) of x as a strip; columns beyond K are zero.
void pack_strip(const HessianUpdateParams& p, int64_t s, int64_t t0, int64_t t1, float* strip) {
  const int64_t cols = min_of(kRows, p.K - s * kRows);
  for (int64_t t = t0; t < t1; ++t, strip += kRows) {
    to_float(p.x, t * p.K + s * kRows, p.dtype, cols, strip);
    for (int64_t c = cols; c < kRows; ++c) strip[c] = 0;
  }
}

struct Packed {
  float* data;
  int64_t size, strips;  // rows of x in it, strips
  const float* at(int64_t s, int64_t t) const { return data + (s * size + t) * kRows; }
};

// Sums [i][j] of one block over the packed rows: rows of H from strip i0 on, columns from strip j0
// on, stored as tiles [kCols][kRows].
void sum_block(const Packed& x, int64_t i0, int64_t i1, int64_t j0, int64_t j1, float* sums) {
  std::memset(sums, 0, size_t((i1 - i0) * (j1 - j0) * kRows * kRows) * sizeof(float));
  for (int64_t t = 0; t < x.size; t += kChunk) {
    const int64_t size = min_of(kChunk, x.size - t);
    float* out = sums;
    for (int64_t j = j0; j < j1; ++j)
      for (int64_t i = i0; i < i1; ++i)
        for (int64_t c = 0; c < kRows; c += kCols, out += kCols * kRows) {
          if (i < j) continue;
          alignas(kVecBytes) float tile[kCols * kRows] = {};
          update_tile<1>(size, x.at(j, t), x.at(i, t) + c, kRows, tile);
          for (int e = 0; e < kCols * kRows; ++e) out[e] += tile[e];
        }
  }
}

void add_block(const HessianUpdateParams& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
               const float* sums) {
  for (int64_t j = j0; j < j1; ++j)
    for (int64_t i = i0; i < i1; ++i)
      for (int64_t r = 0; r < kRows; ++r, sums += kRows) {
        const int64_t row = i * kRows + r, col = j * kRows;
        if (row >= p.K) continue;
        float* h = p.H + row * p.K + col;
        const int64_t cols = min_of(kRows, row + 1 - col);
        for (int64_t c = 0; c < cols; ++c) h[c] = float(h[c] + p.alpha * sums[c]);
      }
}

}  // namespace

void hessian_update(const HessianUpdateParams& p) {
  const int64_t strips = ceil_div(p.K, kRows), blocks = ceil_div(strips, kBlockStrips);
  int64_t threads = 1;
#ifdef _OPENMP
  threads = omp_get_max_threads();
#endif
  const int64_t packed = strips * min_of(p.T, kFlush) * kRows;
  Scratch scratch(packed + threads * kBlock * kBlock);
  for (int64_t t = 0; t < p.T; t += kFlush) {
    const Packed x{scratch.data(), min_of(kFlush, p.T - t), strips};
#pragma omp parallel for schedule(static)
    for (int64_t s = 0; s < strips; ++s)
      pack_strip(p, s, t, t + x.size, scratch.data() + s * x.size * kRows);
#pragma omp parallel for schedule(dynamic)
    for (int64_t b = 0; b < blocks * (blocks + 1) / 2; ++b) {
      int64_t row = 0, before = 0;  // block b is in this row of blocks, which starts at `before`
      while (before + row < b) before += ++row;
      const int64_t i0 = row * kBlockStrips, j0 = (b - before) * kBlockStrips;
      const int64_t i1 = min_of(i0 + kBlockStrips, strips), j1 = min_of(j0 + kBlockStrips, strips);
      int64_t thread = 0;
#ifdef _OPENMP
      thread = omp_get_thread_num();
#endif
      float* sums = scratch.data() + packed + thread * kBlock * kBlock;
      sum_block(x, i0, i1, j0, j1, sums);
      add_block(p, i0, i1, j0, j1, sums);
    }
  }
}

}  // namespace llmkern::LLMKERN_ISA
