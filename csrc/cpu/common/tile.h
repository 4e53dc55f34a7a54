// fp32 register tiles for the CPU kernels that factor, accumulate and quantize in float32.
//
// A matrix is held in strips of kRows rows, transposed: strip[k][kRows], so that one column of a
// strip fills whole vector registers and a row of numbers that multiplies it is broadcast:
//
//   c[kCols][kRows] += sum_k  u[k][0..kCols) * e[k][kRows]
//
// kRows x kCols accumulators stay in registers. On AVX-512, 32 x 8 runs at 134 GFLOP/s per core of
// a Sapphire Rapids Xeon on operands in cache; 48 x 8, 32 x 12 and 64 x 6 tiles at 115.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "cpu/common/integers.h"

namespace llmkern::LLMKERN_ISA {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64, kRowVecs = 2, kCols = 8;
#elif defined(__AVX__)
constexpr int kVecBytes = 32, kRowVecs = 3, kCols = 4;
#else
constexpr int kVecBytes = 16, kRowVecs = 3, kCols = 4;
#endif
constexpr int kLanes = kVecBytes / int(sizeof(float));
constexpr int kRows = kLanes * kRowVecs;

// k-steps per pass over a strip. Its kChunk * kRows floats, 8 KB on AVX-512, and as much of the
// other operand, whose columns lie kRows apart in some callers and then crowd into half the sets,
// stay in L1 even when a sibling hyperthread uses the other half (256 steps: 5 to 20 % slower).
constexpr int64_t kChunk = 64;

typedef float Vec __attribute__((vector_size(kVecBytes), may_alias));

inline Vec splat(float x) { return x - Vec{}; }
inline Vec max_of(Vec a, Vec b) { return a > b ? a : b; }  // b where a is NaN
inline Vec min_of(Vec a, Vec b) { return a < b ? a : b; }

// Round to the nearest integer, ties to even, for |x| < 2^22.
inline Vec round_even(Vec x) {
  constexpr float kMagic = 0x1.8p23f;
  return (x + kMagic) - kMagic;
}

// c += (kSign = 1) or c -= (kSign = -1) the sum over k of u[k][0..kCols) * e[k][kRows].
// e and c are aligned to vectors; u rows are `u_stride` floats apart.
template <int kSign>
inline void update_tile(int64_t k, const float* e, const float* u, int64_t u_stride, float* c) {
  Vec acc[kCols][kRowVecs];
  Vec* out = reinterpret_cast<Vec*>(c);
  const Vec* in = reinterpret_cast<const Vec*>(e);
#pragma GCC unroll 8
  for (int j = 0; j < kCols; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < kRowVecs; ++v) acc[j][v] = out[j * kRowVecs + v];
  for (; k > 0; --k, in += kRowVecs, u += u_stride) {
    Vec x[kRowVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kRowVecs; ++v) x[v] = in[v];
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < kRowVecs; ++v) {
        if (kSign > 0)
          acc[j][v] += x[v] * u[j];
        else
          acc[j][v] -= x[v] * u[j];
      }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kCols; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < kRowVecs; ++v) out[j * kRowVecs + v] = acc[j][v];
}

// Uninitialised scratch memory, on huge pages where the system has them.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    constexpr size_t kPage = size_t(2) << 20;
    const size_t bytes = (size_t(floats) * sizeof(float) + kPage - 1) / kPage * kPage;
    data_ = static_cast<float*>(std::aligned_alloc(kPage, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(data_, bytes, MADV_HUGEPAGE);
#endif
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() { return data_; }

 private:
  float* data_;
};

// Rounds a size up so that the next buffer of a Scratch starts on a cache line.
inline int64_t padded(int64_t floats) { return ceil_div(floats, 16) * 16; }

}  // namespace llmkern::LLMKERN_ISA
