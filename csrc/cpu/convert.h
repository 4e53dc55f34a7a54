// float <-> bfloat16 and float16, over runs of elements. Rounding is to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

#include "llmkern.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace llmkern::LLMKERN_ISA {
namespace {

inline uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline float bfloat16_to_float(uint16_t x) { return bits_float(uint32_t(x) << 16); }

inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x == x ? uint16_t(rounded) : uint16_t((bits >> 16) | 0x40);
}

inline float float16_to_float(uint16_t x) {
#ifdef __F16C__
  return _cvtsh_ss(x);
#else
  const uint32_t sign = uint32_t(x & 0x8000) << 16, magnitude = uint32_t(x & 0x7fff) << 13;
  // Moving the exponent by a multiplication makes subnormals come out right too.
  const uint32_t finite = float_bits(bits_float(magnitude) * 0x1p112f);
  return bits_float(sign | ((x & 0x7c00) == 0x7c00 ? 0x7f800000 | magnitude : finite));
#endif
}

inline uint16_t float_to_float16(float x) {
#ifdef __F16C__
  return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;
  // Below 2^-14 an addition of 0.5 leaves the multiple of 2^-24 in the low bits, rounded.
  if (magnitude < 0x38800000)
    return sign | uint16_t(float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000);
  return sign | uint16_t((magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13);
#endif
}

// n elements of `dtype`, from element `offset` of src, to floats.
inline void to_float(const void* src, int64_t offset, DType dtype, int64_t n, float* dst) {
  if (n == 0) return;  // memcpy refuses the null pointer of an empty tensor
  if (dtype == DType::kFloat32) {
    memcpy(dst, static_cast<const float*>(src) + offset, n * sizeof(float));
    return;
  }
  const uint16_t* s = static_cast<const uint16_t*>(src) + offset;
  if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < n; ++i) dst[i] = bfloat16_to_float(s[i]);
    return;
  }
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(dst + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s + i))));
#endif
  for (; i < n; ++i) dst[i] = float16_to_float(s[i]);
}

// n floats to elements of `dtype`, from element `offset` of dst on.
inline void from_float(const float* src, int64_t n, DType dtype, void* dst, int64_t offset) {
  if (dtype == DType::kFloat32) {
    memcpy(static_cast<float*>(dst) + offset, src, n * sizeof(float));
    return;
  }
  uint16_t* d = static_cast<uint16_t*>(dst) + offset;
  if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < n; ++i) d[i] = float_to_bfloat16(src[i]);
    return;
  }
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(d + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; ++i) d[i] = float_to_float16(src[i]);
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
