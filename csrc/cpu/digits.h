// x as signed 8-bit digits of a fixed-point number, the form in which integer dot products take it.
//
// A chunk of a row of x (at most 128 columns, inside a group of the weight) becomes D digits per
// element: the largest |x| of the chunk fills 8 * D - 1 bits. D = 4 for float32 x (every bit of an
// element down to 2^-30 of the largest is kept), 3 for 16-bit x (down to 2^-22, as a float32
// accumulator would keep). D = 1 is the activation rounded to 8 bits, with one scale per row.
#pragma once

#include <math.h>

#include "int4_tile.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace llmkern::LLMKERN_ISA {
namespace {

template <int D>
struct ChunkDigits {
  alignas(64) int8_t digit[D][kMaxChunk];
  float
      scale;  // NaN if the chunk is not finite, and then the digits are 0; if D > 1 a power of two
};

// How elements of x become integers: value * factor, and back with scale.
struct RowScale {
  float factor, scale;
};

// Largest number that D signed 8-bit digits can hold, rounded down to a float.
template <int D>
constexpr float kLargest = D == 3 ? 8355711.f : 2139062016.f;

// fixed = round(x * factor); x * factor fits.
inline void to_fixed(const float* x, float factor, int64_t n, int32_t* fixed) {
#ifdef __AVX2__
  for (int64_t i = 0; i < n; i += 8)
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(fixed + i),
        _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(factor))));
#else
  for (int64_t i = 0; i < n; ++i) fixed[i] = int32_t(rintf(x[i] * factor));
#endif
}

inline uint32_t largest_magnitude(const float* x, int64_t n) {
  uint32_t top = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = float_bits(x[i]) & 0x7fffffff;
    top = magnitude > top ? magnitude : top;
  }
  return top;
}

// Of a whole row, for D = 1. A row too small for a finite factor counts as 0.
inline RowScale row_scale(const W4A16GemmParams& p, int64_t m, int64_t columns) {
  uint32_t top = 0;
  for (int64_t k = 0; k < p.w.K; k += columns) {
    alignas(64) float x[kMaxChunk];
    to_float(p.x, m * p.x_stride + k, p.dtype, columns, x);
    const uint32_t magnitude = largest_magnitude(x, columns);
    top = magnitude > top ? magnitude : top;
  }
  if (top >= 0x7f800000) return {0, bits_float(0x7fc00000)};
  const float factor = 127.f / bits_float(top);
  return {float_bits(factor) < 0x7f800000 ? factor : 0, bits_float(top) / 127.f};
}

inline void split_chunk(const float* x, int64_t n, const RowScale& row, ChunkDigits<1>& out) {
  alignas(64) int32_t fixed[kMaxChunk];
  out.scale = row.scale;
  to_fixed(x, row.factor, n, fixed);
  for (int64_t i = 0; i < n; ++i) out.digit[0][i] = int8_t(fixed[i]);
}

template <int D>
inline void split_chunk(const float* x, int64_t n, const RowScale&, ChunkDigits<D>& out) {
  const uint32_t top = largest_magnitude(x, n);
  if (top >= 0x7f800000) {
    out.scale = bits_float(0x7fc00000);
    memset(out.digit, 0, sizeof(out.digit));
    return;
  }
  // What is below 2^-126, the smallest normal float, is cut off: the factor would overflow.
  int32_t shift = int32_t(min_of(8 * D - 2 + 127 - int32_t(top >> 23), 126));
  if (bits_float(top) * bits_float(uint32_t(shift + 127) << 23) > kLargest<D>) --shift;
  out.scale = bits_float(uint32_t(127 - shift) << 23);
  alignas(64) int32_t fixed[kMaxChunk];
  to_fixed(x, bits_float(uint32_t(shift + 127) << 23), n, fixed);
  for (int d = 0; d < D; ++d) {
    for (int64_t i = 0; i < n; ++i) {
      out.digit[d][i] = int8_t(fixed[i]);
      fixed[i] = (fixed[i] - out.digit[d][i]) >> 8;
    }
  }
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
