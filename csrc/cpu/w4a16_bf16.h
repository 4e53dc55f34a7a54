// w4a16_gemm by bfloat16 dot products (vdpbf16ps) for bfloat16 x, where they run at full rate: 32
// products per instruction, which digits need at least two instructions for.
//
// The products of x with codes - zeros, which are exact in bfloat16 too, are summed in float32 over
// a chunk, pair after pair of columns; a chunk's sum enters the accumulator once, times scale, in
// ascending k. Both forms below sum in this order, so that a row's result depends on nothing but
// the row and the weight: not on M, its neighbours or the threads.
//
// few   The weight is unpacked in registers, where up to kFewRows rows of x meet it: bound by
//       reading the codes at M = 1.
// many  A chunk of a block of 64 rows of w is unpacked to L1 once, for a panel of rows of x.
//
// Subnormal elements of x count as 0, as these instructions have it.
#pragma once

#include <omp.h>

#include "common/shares.h"
#include "w4a16_bf16_codes.h"
#include "w4a16_block.h"

#ifdef LLMKERN_ISA_ZEN4

namespace llmkern::LLMKERN_ISA {
namespace {

// Rows of x per pass over unpacked codes: their 4 * 6 sums, 4 vectors of codes and a pair of
// columns fill the registers.
constexpr int64_t kDotRows = 6;
// Most rows for which unpacking in registers is faster.
constexpr int64_t kFewRows = 6;
// Distances of codes prefetched into L2, to keep the memory busy (see int4_dot.h), and into L1.
constexpr int64_t kBytesAhead = 32768, kBytesNear = 2048;
// Rows of x that pass over an unpacked chunk together: their accumulators stay in L2.
constexpr int64_t kDotPanel = 258;

// Rows of x in tiles of up to kDotRows: tile [K / 2][rows], pairs of columns in the order of
// `column_order`.
struct Pairs {
  const int32_t* x;
  int64_t rows, K, tiles;

  Pairs(const int32_t* x, int64_t rows, int64_t K)
      : x(x), rows(rows), K(K), tiles(ceil_div(rows, kDotRows)) {}
  // First row of tile t: the tiles' sizes differ by one at most.
  int64_t first(int64_t t) const { return t * rows / tiles; }
};

// Row m of x, row m - first of a tile of `count` rows.
inline void pair_row(const W4A16GemmParams& p, int64_t m, int64_t count, int32_t* out) {
  const uint16_t* x = static_cast<const uint16_t*>(p.x) + m * p.x_stride;
  const __m512i order = column_order();
  for (int64_t k = 0; k < p.w.K; k += 32, out += 16 * count) {
    alignas(64) int32_t pairs[16];
    const __m512i ordered = _mm512_permutexvar_epi16(order, _mm512_loadu_si512(x + k));
    _mm512_store_si512(count == 1 ? out : pairs, ordered);
    if (count == 1) continue;
    for (int i = 0; i < 16; ++i) out[i * count] = pairs[i];
  }
}

inline __m512 dot(__m512 sum, __m512i w, __m512i x) {
  return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
}

// acc [R, 64] += scales * sums.
template <int R>
inline void add_scaled(const __m512 (*sums)[4], const float* scales, float* acc) {
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      float* to = acc + r * kBlock + 16 * v;
      _mm512_store_ps(
          to, _mm512_fmadd_ps(_mm512_load_ps(scales + 16 * v), sums[r][v], _mm512_load_ps(to)));
    }
}

// R rows of x with a chunk in registers.
template <int R, bool SYMMETRIC>
inline void dot_packed(const Tile& tile, const CodeTable<SYMMETRIC>& table, int64_t columns,
                       const int32_t* x, float* acc) {
  __m512 sums[R][4] = {};
  __m512i zeros[4];
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) zeros[v] = table.zeros(tile.zeros + 16 * v);
  const uint8_t* from = tile.qweight;
  for (int64_t q = 0; q < columns / 4; ++q, from += kQuadBytes, x += 2 * R) {
#pragma GCC unroll 2
    for (int line = 0; line < kQuadBytes; line += 64) {
      __builtin_prefetch(from + kBytesAhead + line, 0, 2);
      __builtin_prefetch(from + kBytesNear + line);
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512i packed = _mm512_loadu_si512(from + 64 * half);
#pragma GCC unroll 2
      for (int pair = 0; pair < 2; ++pair) {
        const __m512i words = pair ? _mm512_srli_epi16(packed, 8) : packed;
        const __m512i low = table.look_up(words, zeros[2 * half]);
        const __m512i high = table.look_up(_mm512_srli_epi16(words, 4), zeros[2 * half + 1]);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          const __m512i columns_of_x = _mm512_set1_epi32(x[pair * R + r]);
          sums[r][2 * half] = dot(sums[r][2 * half], low, columns_of_x);
          sums[r][2 * half + 1] = dot(sums[r][2 * half + 1], high, columns_of_x);
        }
      }
    }
  }
  add_scaled<R>(sums, tile.scales, acc);
}

// R rows of x with an unpacked chunk.
template <int R>
inline void dot_unpacked(const Bf16Codes& codes, const float* scales, int64_t columns,
                         const int32_t* x, float* acc) {
  __m512 sums[R][4] = {};
  const uint16_t* b = codes.b;
  const int64_t next = columns * 16;
  for (int64_t pair = 0; pair < columns / 2; ++pair, b += 32, x += R) {
    __m512i w[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) w[v] = _mm512_load_si512(b + v * next);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m512i columns_of_x = _mm512_set1_epi32(x[r]);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sums[r][v] = dot(sums[r][v], w[v], columns_of_x);
    }
  }
  add_scaled<R>(sums, scales, acc);
}

inline void dot_unpacked(int64_t rows, const Bf16Codes& codes, const float* scales, int64_t columns,
                         const int32_t* x, float* acc) {
  if (rows == 1) dot_unpacked<1>(codes, scales, columns, x, acc);
  if (rows == 2) dot_unpacked<2>(codes, scales, columns, x, acc);
  if (rows == 3) dot_unpacked<3>(codes, scales, columns, x, acc);
  if (rows == 4) dot_unpacked<4>(codes, scales, columns, x, acc);
  if (rows == 5) dot_unpacked<5>(codes, scales, columns, x, acc);
  if (rows == 6) dot_unpacked<6>(codes, scales, columns, x, acc);
}

// Columns n0 .. n0 + 63 of the output for all R rows.
template <int R, bool SYMMETRIC>
void multiply_few_rows(const W4A16GemmParams& p, const int32_t* x, int64_t n0) {
  const int64_t columns = chunk_columns(p.w.group_size);
  alignas(64) float acc[R * kBlock] = {};
  const CodeTable<SYMMETRIC> table;
  Tile tile;
  start_block(p.w, n0, tile);
  for (int64_t k = 0; k < p.w.K; k += columns) {
    load_tile(p.w, n0, k, columns, tile);
    dot_packed<R, SYMMETRIC>(tile, table, columns, x + k / 2 * R, acc);
  }
  store_block(p, acc, 0, R, n0);
}

template <bool SYMMETRIC>
void multiply_few(const W4A16GemmParams& p, const int32_t* x, int64_t n0) {
  if (p.M == 1) multiply_few_rows<1, SYMMETRIC>(p, x, n0);
  if (p.M == 2) multiply_few_rows<2, SYMMETRIC>(p, x, n0);
  if (p.M == 3) multiply_few_rows<3, SYMMETRIC>(p, x, n0);
  if (p.M == 4) multiply_few_rows<4, SYMMETRIC>(p, x, n0);
  if (p.M == 5) multiply_few_rows<5, SYMMETRIC>(p, x, n0);
  if (p.M == 6) multiply_few_rows<6, SYMMETRIC>(p, x, n0);
}

// Columns n0 .. n0 + 63 of the output for the rows of `panel`, which start at row m0 of x.
inline void multiply_panel(const W4A16GemmParams& p, const Pairs& panel, int64_t m0, int64_t n0) {
  const int64_t columns = chunk_columns(p.w.group_size);
  alignas(64) float acc[kDotPanel * kBlock];
  memset(acc, 0, panel.rows * kBlock * sizeof(float));
  Tile tile;
  Bf16Codes codes;
  start_block(p.w, n0, tile);
  for (int64_t k = 0; k < panel.K; k += columns) {
    load_tile(p.w, n0, k, columns, tile);
    unpack(tile, columns, !p.w.zeros, codes);
    for (int64_t t = 0; t < panel.tiles; ++t) {
      const int64_t first = panel.first(t), rows = panel.first(t + 1) - first;
      dot_unpacked(rows, codes, tile.scales, columns, panel.x + (first * panel.K + k * rows) / 2,
                   acc + first * kBlock);
    }
  }
  store_block(p, acc, m0, panel.rows, n0);
}

inline void multiply_bf16(const W4A16GemmParams& p) {
  const int64_t N = p.w.N, K = p.w.K;
  const int64_t step = min_of(p.M, (kWorkspaceBytes / (kDotPanel * K * 2 + 1) + 1) * kDotPanel);
  const Buffer<int32_t> buffer(step * K / 2);
  int32_t* x = buffer.data();
  for (int64_t m0 = 0; m0 < p.M; m0 += step) {
    const Pieces pieces(min_of(step, p.M - m0), kDotPanel, N);
    const auto panel_of = [&](int64_t i) {
      return Pairs(x + pieces.first(i) * K / 2, pieces.last(i) - pieces.first(i), K);
    };
#pragma omp parallel if (pieces.rows * K >= kParallelSplit)
    for (int64_t i = 0; i < pieces.panels; ++i) {
      const Pairs panel = panel_of(i);
#pragma omp for schedule(static) nowait
      for (int64_t t = 0; t < panel.tiles; ++t) {
        const int64_t first = pieces.first(i) + panel.first(t);
        const int64_t rows = panel.first(t + 1) - panel.first(t);
        for (int64_t r = 0; r < rows; ++r) pair_row(p, m0 + first + r, rows, x + first * K / 2 + r);
      }
    }
    const bool parallel = pieces.rows * N * K >= kParallelWork;
    Shares shares(pieces.count, parallel ? omp_get_max_threads() : 1);
#pragma omp parallel if (parallel)
    for (int64_t i; (i = shares.next(omp_get_thread_num())) >= 0;) {
      if (p.M > kFewRows)
        multiply_panel(p, panel_of(i), m0 + pieces.first(i), pieces.n0(i));
      else if (p.w.zeros)
        multiply_few<false>(p, x, pieces.n0(i));
      else
        multiply_few<true>(p, x, pieces.n0(i));
    }
  }
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
#endif
