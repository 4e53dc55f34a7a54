// A whole product with a 2:4 sparse weight: strips of blocks, panels of columns, and the threads.
//
// A Reader says where a panel of a block lies: in the kernel layout where it is, in the canonical
// one after it has been brought, block by block, into a thread's own memory.
#pragma once

#include <omp.h>

#include "common/shares.h"
#include "sparse24_block.h"

namespace llmkern::LLMKERN_ISA {
namespace {

// Multiplications below which waking the other threads costs more than it gains.
constexpr int64_t kParallelWork = 1 << 19;
// Elements of x below which one thread prepares them all.
constexpr int64_t kParallelElements = 1 << 16;
// Rows of x that pass over a panel together, which then lie in L2: 128 rows by 128 columns, 64 KB.
constexpr int64_t kPanelRows = 128;
// Blocks of a strip: so many share a panel of x, unless there are few rows, or few blocks to share.
constexpr int64_t kManyBlocks = 16, kFewBlocks = 4, kFewRows = 8, kLeastStrips = 16;
// Distance of rows of x beyond their length, off the powers of two that would crowd a few cache
// sets.
constexpr int64_t kGap = 32;

struct Product {
  const void* x;  // [M, K]
  const void* bias;
  void* out;
  int64_t M, N, K, x_stride;
  DType dtype;
};

struct Rows {
  int64_t first, count;
};

// One row of x for Floats; columns of codes i places up are divided by 16^i.
inline void prepare(const Product& p, int64_t m, bool codes, int64_t width, float* out) {
  to_float(p.x, m * p.x_stride, p.dtype, p.K, out);
  for (int64_t k = p.K; k < width; ++k) out[k] = 0;
  if (!codes) return;
  constexpr float kPlaces[] = {1, 1 / 16.f, 1 / 256.f, 1 / 4096.f};
  for (int64_t k = 0; k < width; ++k) out[k] *= kPlaces[k / 4 % 4];
}

#ifdef __AVX512BF16__
inline void prepare(const Product& p, int64_t m, bool, int64_t width, uint16_t* out) {
  if (p.K) memcpy(out, static_cast<const uint16_t*>(p.x) + m * p.x_stride, p.K * 2);
  for (int64_t k = p.K; k < width; ++k) out[k] = 0;
}
#endif

// Up to kFewBlocks blocks times C rows of x.
template <int C, typename Weight, typename X>
inline void multiply_rows(const Weight* blocks, int64_t count, int64_t words, const X& x,
                          float* sums, int64_t sums_stride) {
  int64_t r = 0;
  for (; r + kSharing<C> <= count; r += kSharing<C>)
    multiply_tile<kSharing<C>, C>(blocks + r, words, x, sums + r * kBlockRows, sums_stride);
  for (; r < count; ++r)
    multiply_tile<1, C>(blocks + r, words, x, sums + r * kBlockRows, sums_stride);
}

// Output columns of `count` blocks from `first` on, for the rows of x, prepared, at `x`.
template <typename Reader, typename X>
void multiply_strip(const Product& p, const Reader& reader, X x, Rows rows, int64_t first,
                    int64_t count, float* sums, void* scratch) {
  typename Reader::Weight blocks[kManyBlocks];
  const int64_t width = count * kBlockRows, columns = reader.columns();
  memset(sums, 0, rows.count * width * sizeof(float));
  for (int64_t k = 0; k < p.K; k += columns, x.x += columns) {
    const int64_t words = ceil_div(min_of(columns, p.K - k), kWordCols);
    reader.load(first, count, k, words, scratch, blocks);
    for (int64_t b = 0; b < count; b += kFewBlocks) {
      const int64_t some = min_of(kFewBlocks, count - b);
      for (int64_t m = 0; m < rows.count;) {
        const X at = {x.x + m * x.stride, x.stride};
        float* sum = sums + m * width + b * kBlockRows;
        const int64_t left = rows.count - m;
        if (left >= 4)
          multiply_rows<4>(blocks + b, some, words, at, sum, width), m += 4;
        else if (left >= 2)
          multiply_rows<2>(blocks + b, some, words, at, sum, width), m += 2;
        else
          multiply_rows<1>(blocks + b, some, words, at, sum, width), m += 1;
      }
    }
  }
  const int64_t n0 = first * kBlockRows, outputs = min_of(width, p.N - n0);
  float bias[kManyBlocks * kBlockRows] = {};
  if (p.bias) to_float(p.bias, n0, p.dtype, outputs, bias);
  for (int64_t m = 0; m < rows.count; ++m) {
    float* y = sums + m * width;
    for (int64_t n = 0; n < outputs; ++n) y[n] += bias[n];
    from_float(y, outputs, p.dtype, p.out, (rows.first + m) * p.N + n0);
  }
}

template <typename X, typename Reader>
void multiply(const Product& p, const Reader& reader) {
  using Element = typename X::Element;
  const int64_t most = min_of(p.M, kPanelRows), blocks = ceil_div(p.N, kBlockRows);
  const int64_t width = ceil_div(p.K, kWordCols) * kWordCols, stride = width + kGap;
  const bool few = p.M <= kFewRows || blocks < kLeastStrips * kManyBlocks;
  const int64_t strip = few ? kFewBlocks : kManyBlocks;
  const bool parallel = most * p.N * p.K >= kParallelWork;
  const int64_t sums_at = padded(ceil_div(most * stride * int64_t(sizeof(Element)), 4));
  const int64_t scratch_at = padded(most * strip * kBlockRows);
  const int64_t floats = scratch_at + padded(reader.scratch_floats(strip));
  const Buffer<float> buffer(sums_at + floats * (parallel ? omp_get_max_threads() : 1));
  Element* rows_of_x = reinterpret_cast<Element*>(buffer.data());
  for (int64_t m0 = 0; m0 < p.M; m0 += kPanelRows) {
    const Rows rows = {m0, min_of(kPanelRows, p.M - m0)};
#pragma omp parallel for schedule(static) if (rows.count * p.K >= kParallelElements)
    for (int64_t m = 0; m < rows.count; ++m)
      prepare(p, m0 + m, Reader::Weight::kScaled, width, rows_of_x + m * stride);
    Shares shares(ceil_div(blocks, strip), parallel ? omp_get_max_threads() : 1);
#pragma omp parallel if (parallel)
    for (int64_t i; (i = shares.next(omp_get_thread_num())) >= 0;) {
      const int64_t first = i * strip;
      float* own = buffer.data() + sums_at + floats * (parallel ? omp_get_thread_num() : 0);
      multiply_strip(p, reader, X{rows_of_x, stride}, rows, first, min_of(strip, blocks - first),
                     own, own + scratch_at);
    }
  }
}

// Metadata of a canonical block, `words` words from column k on, as the kernel layout has it.
inline void repack_meta(const void* meta, int64_t N, int64_t K, int64_t n0, int64_t k,
                        int64_t words, int32_t* out) {
  for (int64_t r = 0; r < kBlockRows; ++r) {
    const bool there = n0 + r < N;
    const uint8_t* row = static_cast<const uint8_t*>(meta) + (n0 + r) * (K / 8);
    for (int64_t word = 0; word < words; ++word) {
      uint32_t nibbles = 0x44444444;  // padding: columns 0 and 1, whose values are 0
      const int64_t at = k / 8 + word * 4;
      if (there) memcpy(&nibbles, row + at, size_t(min_of(4, K / 8 - at)));
      out[word * kBlockRows + r] = int32_t(nibbles);
    }
  }
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
