// lut4_gemm on AMX for bfloat16 x: outᵀ = w xᵀ in tiles of bfloat16, summed in float32. The weight
// is rounded to bfloat16 once, as its product of scale and entry: the values are those of torch's
// product with the dequantized weight.
//
//   A [16 rows of w][32 columns]       B [16 pairs of columns][16 rows of x][2]
//
// Both take the columns of a unit of 32 in the order 0, 16, 1, 17 .. 15, 31, in which one lookup
// turns a unit's 16 bytes into a tile row. A row's result depends on neither its neighbours nor the
// threads, nor on M while M is served by this form. Subnormal elements of x count as 0.
#pragma once

#include "amx.h"
#include "lut4_rows.h"

#ifdef __AMX_BF16__

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int64_t kAmxRows = 64, kAmxCols = 256;  // of w, expanded at a time: 32 KB
// Rows of x that pass over an expanded block together.
constexpr int64_t kAmxPanel = 256;
constexpr int64_t kTileWords = 512;

// x as B tiles: [groups of 16 rows][K / 32][16][16][2], zeros beyond M.
inline void pack_group(const Lut4GemmParams& p, int64_t m0, int64_t rows, uint16_t* out) {
  if (rows < kTileRows) memset(out, 0, kTileRows * p.w.K * 2);
  for (int64_t r = 0; r < min_of(rows, kTileRows); ++r) {
    const uint16_t* x = static_cast<const uint16_t*>(p.x) + (m0 + r) * p.x_stride;
    for (int64_t k = 0; k < p.w.K; k += kUnit) {
      uint16_t* to = out + k * kTileRows + 2 * r;
      for (int64_t i = 0; i < 16; ++i) {
        to[32 * i] = x[k + i];
        to[32 * i + 1] = x[k + 16 + i];
      }
    }
  }
}

// Columns first .. last - 1 of row r of the block as rows of A tiles, one tile apart.
inline void expand_row(const Lut4Weight& w, const Rows& rows, int64_t r, int64_t first,
                       int64_t last, uint16_t* out) {
  const uint8_t* unit = rows.codes(r) + first / 2;
  const RowBooks books = rows.books(r);
  for (int64_t k = first; k < last;) {
    const int64_t g = k / w.group_size, end = min_of(last, (g + 1) * w.group_size);
    const __m256i entries = reinterpret_cast<__m256i>(
        _mm512_cvtneps_pbh(__m512(books.at(g, w.book_group_stride).entries)));
    // Twice, so that the fifth bit of an index does not matter.
    const __m512i table =
        _mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(entries), entries, 1);
    for (; k < end; k += kUnit, unit += kUnitBytes, out += kTileWords) {
      const __m512i bytes = _mm512_maskz_cvtepu8_epi32(
          0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(unit)));
      const __m512i words = _mm512_or_si512(bytes, _mm512_maskz_slli_epi32(0xffff, bytes, 12));
      _mm512_store_si512(out, _mm512_maskz_permutexvar_epi16(~0u, words, table));
    }
  }
}

// c[i][j] += a[i] * b[j] over `steps` tiles, 2 tiles of w by up to 2 of x. `next`: words from one
// tile of rows to the next.
template <bool PAIR>
inline void dot_tiles(const uint16_t* a, int64_t a_next, const uint16_t* b, int64_t b_next,
                      int64_t steps, bool fresh, float* c, int64_t c_next) {
  if (fresh) {
    tile_zero<0>(), tile_zero<2>();
    if (PAIR) tile_zero<1>(), tile_zero<3>();
  } else {
    tile_load<0>(c, 64), tile_load<2>(c + c_next, 64);
    if (PAIR) tile_load<1>(c + 256, 64), tile_load<3>(c + c_next + 256, 64);
  }
  for (int64_t s = 0; s < steps; ++s, a += kTileWords, b += kTileWords) {
    tile_load<4>(a, 64), tile_load<6>(b, 64);
    tile_dot_bf16<0, 4, 6>();
    tile_load<5>(a + a_next, 64);
    tile_dot_bf16<2, 5, 6>();
    if (PAIR) {
      tile_load<7>(b + b_next, 64);
      tile_dot_bf16<1, 4, 7>();
      tile_dot_bf16<3, 5, 7>();
    }
  }
  tile_store<0>(c, 64), tile_store<2>(c + c_next, 64);
  if (PAIR) tile_store<1>(c + 256, 64), tile_store<3>(c + c_next + 256, 64);
}

// Output columns n0 .. n0 + kAmxRows - 1 of `rows` rows of x from m0 on, packed at `x`.
inline void multiply_block(const Lut4GemmParams& p, const uint16_t* x, float* scratch, int64_t m0,
                           int64_t rows, int64_t n0) {
  constexpr int64_t kTiles = kAmxRows / kTileRows, kNext = kAmxPanel / kTileRows * 256;
  alignas(64) float sums[kTiles][kAmxPanel / kTileRows][kTileRows][16];  // [..][row of w][row of x]
  alignas(64) uint16_t expanded[kAmxRows * kAmxCols];
  Rows w(p.w, scratch, kAmxRows);
  w.load(n0, kAmxRows);
  for (int64_t first = 0; first < p.w.K; first += kAmxCols) {
    const int64_t last = min_of(p.w.K, first + kAmxCols), steps = (last - first) / kUnit;
    for (int64_t r = 0; r < kAmxRows; ++r)
      expand_row(p.w, w, r, first, last,
                 expanded + r / kTileRows * steps * kTileWords + r % kTileRows * kUnit);
    for (int64_t m = 0; m < rows; m += 2 * kTileRows) {
      const uint16_t* b = x + m * p.w.K + first * kTileRows;
      for (int64_t t = 0; t < kTiles; t += 2) {
        const uint16_t* a = expanded + t * steps * kTileWords;
        float* c = sums[t][m / kTileRows][0];
        if (rows - m > kTileRows)
          dot_tiles<true>(a, steps * kTileWords, b, kTileRows * p.w.K, steps, first == 0, c, kNext);
        else
          dot_tiles<false>(a, steps * kTileWords, b, 0, steps, first == 0, c, kNext);
      }
    }
  }
  const int64_t count = min_of(kAmxRows, p.w.N - n0);
  float bias[kAmxRows] = {}, y[kAmxRows];
  if (p.bias) to_float(p.bias, n0, p.dtype, count, bias);
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < kAmxRows; ++n)
      y[n] = sums[n / kTileRows][m / kTileRows][n % kTileRows][m % kTileRows] + bias[n];
    from_float(y, count, p.dtype, p.out, (m0 + m) * p.w.N + n0);
  }
}

inline void multiply_amx(const Lut4GemmParams& p) {
  const int64_t N = p.w.N, K = p.w.K, blocks = ceil_div(N, kAmxRows);
  const int64_t panels = ceil_div(p.M, kAmxPanel), groups = ceil_div(p.M, kTileRows);
  const int64_t packed = groups * kTileRows * K / 2;  // in floats
  const int64_t floats = Rows::scratch_floats(p.w, kAmxRows);
  const Buffer<float> buffer(packed + floats * omp_get_max_threads());
  uint16_t* x = reinterpret_cast<uint16_t*>(buffer.data());
#pragma omp parallel for schedule(static) if (p.M * K >= kParallelElements)
  for (int64_t g = 0; g < groups; ++g)
    pack_group(p, g * kTileRows, p.M - g * kTileRows, x + g * kTileRows * K);
#pragma omp parallel if (p.M * N * K >= kParallelWork)
  {
    const TileShape t = {kTileRows, 64};
    const TileConfig config({t, t, t, t, t, t, t, t});
    // Panels of a block adjoin: its weights stay in a cache between them.
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < panels * blocks; ++i) {
      const int64_t m0 = i % panels * kAmxPanel;
      multiply_block(p, x + m0 * K, buffer.data() + packed + floats * omp_get_thread_num(), m0,
                     min_of(kAmxPanel, p.M - m0), i / panels * kAmxRows);
    }
  }
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
#endif
