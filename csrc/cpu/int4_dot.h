// Exact dot products of one tile's 4-bit codes with rows of x held as 8-bit digits:
//
//   sums[(r * D + d) * 64 + n] = sum_k (codes[n, k] - zeros[n]) * digit_d(x[r, k])
//
// Integers throughout, so neither the order nor the instruction set changes a bit of the result. A
// dword of x holds one digit of four columns; it is multiplied with a dword of codes per row of the
// weight, by vpdpbusd, or by vpmaddubsw whose 16-bit sums of 8 dwords cannot overflow (8 * 2 * 15 *
// 128 < 2^15).
#pragma once

#include "int4_tile.h"

#if defined(__AVX2__) || defined(__AVX512BW__)
#include <immintrin.h>
#define LLMKERN_SIMD
#endif

namespace llmkern::LLMKERN_ISA {
namespace {

#if defined(__AVX512BW__)
constexpr int kLanes = 16;
using Ints = __m512i;
inline Ints load(const void* p) { return _mm512_loadu_si512(p); }
inline void store(void* p, Ints a) { _mm512_storeu_si512(p, a); }
inline Ints broadcast(int32_t x) { return _mm512_set1_epi32(x); }
inline Ints low_nibbles(Ints a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
inline Ints high_nibbles(Ints a) { return low_nibbles(_mm512_srli_epi16(a, 4)); }
inline Ints multiply_pairs(Ints a, Ints b) { return _mm512_madd_epi16(a, b); }
inline Ints subtract(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
#elif defined(__AVX2__)
constexpr int kLanes = 8;
using Ints = __m256i;
inline Ints load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store(void* p, Ints a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
inline Ints broadcast(int32_t x) { return _mm256_set1_epi32(x); }
inline Ints low_nibbles(Ints a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
inline Ints high_nibbles(Ints a) { return low_nibbles(_mm256_srli_epi16(a, 4)); }
inline Ints multiply_pairs(Ints a, Ints b) { return _mm256_madd_epi16(a, b); }
inline Ints subtract(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
#endif

// acc += codes . x over 8 dwords: begin, 8 times step, end.
#if defined(__AVX512VNNI__)
inline Ints begin(Ints acc) { return acc; }
inline Ints step(Ints part, Ints codes, Ints x) { return _mm512_dpbusd_epi32(part, codes, x); }
inline Ints end(Ints, Ints part) { return part; }
#elif defined(__AVX512BW__)
inline Ints begin(Ints) { return _mm512_setzero_si512(); }
inline Ints step(Ints part, Ints codes, Ints x) {
  return _mm512_add_epi16(part, _mm512_maddubs_epi16(codes, x));
}
inline Ints end(Ints acc, Ints part) {
  return _mm512_add_epi32(acc, _mm512_madd_epi16(part, _mm512_set1_epi16(1)));
}
#elif defined(__AVX2__)
inline Ints begin(Ints) { return _mm256_setzero_si256(); }
inline Ints step(Ints part, Ints codes, Ints x) {
  return _mm256_add_epi16(part, _mm256_maddubs_epi16(codes, x));
}
inline Ints end(Ints acc, Ints part) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(part, _mm256_set1_epi16(1)));
}
#endif

#ifdef LLMKERN_SIMD
// Rows of x that share one unpacking of the codes: as many as the accumulators allow.
template <int D>
constexpr int kRows = kLanes == 16 ? (D == 1   ? 6
                                      : D == 3 ? 4
                                               : 3)
                                   : 1;

// U registers of packed codes at once, from register u0 of each 128 bytes on.
template <int R, int D, int U>
inline void dot_registers(const Tile& tile, int64_t quads, const int32_t* x, const int32_t* x_sums,
                          int u0, int32_t* sums) {
  const uint8_t* q = tile.qweight + u0 * kLanes * 4;
  // Rows of the weight that register u's low and high nibbles belong to.
  const auto row = [u0](int u, int high) {
    const int dword = (u0 + u) * kLanes;
    return dword / 16 * 32 + dword % 16 + high * 16;
  };
  Ints acc[R * D][2 * U];
  for (int i = 0; i < R * D; ++i) {
    // Both fit 16 bits and the upper halves of the zeros are 0: one 16-bit multiplication does.
    const Ints x_sum = broadcast(x_sums[i]);
    for (int v = 0; v < 2 * U; ++v)
      acc[i][v] =
          subtract(broadcast(0), multiply_pairs(load(tile.zeros + row(v / 2, v % 2)), x_sum));
  }
  for (int64_t quad = 0; quad < quads; quad += 8) {
    Ints part[R * D][2 * U];
    for (int i = 0; i < R * D; ++i)
      for (int v = 0; v < 2 * U; ++v) part[i][v] = begin(acc[i][v]);
#pragma GCC unroll 8
    for (int s = 0; s < 8; ++s) {
      Ints codes[2 * U];
      for (int u = 0; u < U; ++u) {
        const uint8_t* at = q + (quad + s) * kQuadBytes + u * kLanes * 4;
        // Beyond the reach of the hardware prefetcher, which stops at 4 KB pages, and into L2: the
        // L1 cache can wait for too few lines at a time to keep the memory busy.
        if (R == 1) __builtin_prefetch(at + 4096, 0, 2);
        const Ints packed = load(at);
        codes[2 * u] = low_nibbles(packed);
        codes[2 * u + 1] = high_nibbles(packed);
      }
      for (int i = 0; i < R * D; ++i) {
        const Ints digit = broadcast(x[(quad + s) * R * D + i]);
        for (int v = 0; v < 2 * U; ++v) part[i][v] = step(part[i][v], codes[v], digit);
      }
    }
    for (int i = 0; i < R * D; ++i)
      for (int v = 0; v < 2 * U; ++v) acc[i][v] = end(acc[i][v], part[i][v]);
  }
  for (int i = 0; i < R * D; ++i)
    for (int v = 0; v < 2 * U; ++v) store(sums + i * kBlock + row(v / 2, v % 2), acc[i][v]);
}

#ifdef __AVX512VNNI__
// One row of x with the tiles of two blocks of the weight: the hardware prefetches two streams
// further ahead than one.
template <int D>
inline void dot_two_tiles(const Tile* tiles, int64_t quads, const int32_t* x, const int32_t* x_sums,
                          int32_t (*sums)[D * kBlock]) {
  Ints acc[D][2][4];
#pragma GCC unroll 4
  for (int i = 0; i < D; ++i)
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v)
        acc[i][t][v] = subtract(
            broadcast(0), multiply_pairs(load(tiles[t].zeros + 16 * v), broadcast(x_sums[i])));
#pragma GCC unroll 2
  for (int64_t quad = 0; quad < quads; ++quad) {
    Ints codes[2][4];
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t) {
      const uint8_t* at = tiles[t].qweight + quad * kQuadBytes;
      __builtin_prefetch(at + 2048, 0, 2);
      __builtin_prefetch(at + 2048 + 64, 0, 2);
#pragma GCC unroll 2
      for (int u = 0; u < 2; ++u) {
        const Ints packed = load(at + 64 * u);
        codes[t][2 * u] = low_nibbles(packed);
        codes[t][2 * u + 1] = high_nibbles(packed);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < D; ++i) {
      const Ints digit = broadcast(x[quad * D + i]);
#pragma GCC unroll 2
      for (int t = 0; t < 2; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) acc[i][t][v] = step(acc[i][t][v], codes[t][v], digit);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < D; ++i)
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) store(sums[t] + i * kBlock + 16 * v, acc[i][t][v]);
}
#endif

template <int R, int D>
inline void dot_tile(const Tile& tile, int64_t quads, const int32_t* x, const int32_t* x_sums,
                     int32_t* sums) {
  constexpr int U = kLanes == 16 && R * D <= 6 ? 2 : 1;
  for (int u0 = 0; u0 < 32 / kLanes; u0 += U)
    dot_registers<R, D, U>(tile, quads, x, x_sums, u0, sums);
}
#else
template <int D>
constexpr int kRows = 1;

// Sums of at most 128 products of 4 by 8 bits are exact in floats, which every compiler vectorises.
template <int R, int D>
inline void dot_tile(const Tile& tile, int64_t quads, const int32_t* x, const int32_t* x_sums,
                     int32_t* sums) {
  static_assert(R == 1, "one row at a time");
  for (int d = 0; d < D; ++d) {
    float acc[2][32];
    for (int c = 0; c < 32; ++c) acc[0][c] = acc[1][c] = 0;
    for (int64_t quad = 0; quad < quads; ++quad) {
      for (int i = 0; i < 4; ++i) {
        const float digit = float(int8_t(uint32_t(x[quad * D + d]) >> (8 * i)));
        for (int c = 0; c < 32; ++c) {
          uint32_t word;
          memcpy(&word, tile.qweight + quad * kQuadBytes + 4 * c, 4);
          acc[0][c] += digit * float(int32_t(word >> (8 * i) & 15));
          acc[1][c] += digit * float(int32_t(word >> (8 * i + 4) & 15));
        }
      }
    }
    for (int n = 0; n < kBlock; ++n)
      sums[d * kBlock + n] =
          int32_t(acc[n % 32 / 16][n / 32 * 16 + n % 16]) - tile.zeros[n] * int16_t(x_sums[d]);
  }
}
#endif

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
