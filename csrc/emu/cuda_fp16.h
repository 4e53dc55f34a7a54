// Stands in for CUDA's float16 header on the host.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "emu/half_math.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half v) {
  const int exponent = v.bits >> 10 & 31, mantissa = v.bits & 1023;
  float magnitude;
  if (exponent == 31)
    magnitude = mantissa ? NAN : INFINITY;
  else if (exponent == 0)
    magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  else
    magnitude = std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  return v.bits & 0x8000 ? -magnitude : magnitude;
}

// To nearest, ties to even.
inline __half __float2half_rn(float v) {
  const auto sign = static_cast<uint16_t>(std::signbit(v) ? 0x8000 : 0);
  if (std::isnan(v)) return {0x7fff};
  const float magnitude = std::fabs(v);
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent;
  std::frexp(magnitude, &exponent);
  // The last bit of a float16 near v is worth 2^(exponent - 11), and 2^-24 among subnormals.
  // Rounding up to the next power of two carries into the exponent field by itself.
  const int last = magnitude == 0.0f ? -24 : std::max(exponent - 11, -24);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -last)));
  return {static_cast<uint16_t>(sign | (steps + (last + 24) * 1024))};
}

LLMKERN_EMU_HALF_MATH(__half, __half2, __half2float, __float2half_rn, half)

inline __half2 __half2half2(__half v) { return {v, v}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
