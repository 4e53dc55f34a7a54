// Arithmetic of the 16-bit types with one rounding, as the device does it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace llmkern::emu {

// v as a float whose last bit is set if v is not exactly a float ("round to odd"): rounding that
// once more, to a narrower type, is as rounding v itself.
inline float to_odd(double v) {
  const auto f = static_cast<float>(v);
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof(bits));
  if (std::isnan(v) || f == v || bits & 1) return f;
  return std::nextafter(f, v > f ? INFINITY : -INFINITY);
}

// a * b + c, the factors of at most 26 significant bits, ready for rounding to 16 bits.
inline float fma_to_odd(double a, double b, double c) {
  const double product = a * b;  // exact
  double sum = product + c;
  const double part = sum - product, error = (product - (sum - part)) + (c - part);
  uint64_t bits;
  std::memcpy(&bits, &sum, sizeof(bits));
  if (std::isfinite(sum) && error != 0.0 && !(bits & 1))
    sum = std::nextafter(sum, error > 0.0 ? INFINITY : -INFINITY);
  return to_odd(sum);
}

}  // namespace llmkern::emu

// Arithmetic on a 16-bit type and on pairs of it, from its conversions.
#define LLMKERN_EMU_HALF_MATH(type, pair, to_float, from_float, suffix)                            \
  struct alignas(4) pair {                                                                         \
    type x, y;                                                                                     \
  };                                                                                               \
  inline type __hfma(type a, type b, type c) {                                                     \
    return from_float(::llmkern::emu::fma_to_odd(to_float(a), to_float(b), to_float(c)));          \
  }                                                                                                \
  inline type __hadd(type a, type b) {                                                             \
    return from_float(::llmkern::emu::fma_to_odd(to_float(a), 1.0, to_float(b)));                  \
  }                                                                                                \
  inline type __hsub(type a, type b) {                                                             \
    return from_float(::llmkern::emu::fma_to_odd(to_float(a), 1.0, -to_float(b)));                 \
  }                                                                                                \
  inline type __hmul(type a, type b) {                                                             \
    return from_float(::llmkern::emu::to_odd(double{to_float(a)} * to_float(b)));                  \
  }                                                                                                \
  inline pair __hfma2(pair a, pair b, pair c) {                                                    \
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};                                         \
  }                                                                                                \
  inline pair __hadd2(pair a, pair b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }             \
  inline pair __hsub2(pair a, pair b) { return {__hsub(a.x, b.x), __hsub(a.y, b.y)}; }             \
  inline pair __hmul2(pair a, pair b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }             \
  inline pair __floats2##suffix##2_rn(float x, float y) { return {from_float(x), from_float(y)}; } \
  inline pair __float22##suffix##2_rn(float2 v) { return {from_float(v.x), from_float(v.y)}; }     \
  inline pair __halves2##suffix##2(type x, type y) { return {x, y}; }                              \
  inline type __ushort_as_##suffix(uint16_t bits) { return type{bits}; }                           \
  inline uint16_t __##suffix##_as_ushort(type v) { return v.bits; }
