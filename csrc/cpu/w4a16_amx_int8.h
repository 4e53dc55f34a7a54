// w4a16_gemm on AMX: one tile instruction multiplies 16 rows of digits with 64 columns of 16 rows
// of the weight, 64 times what vpdpbusd does in four times its time. The sums are the same
// integers, so the results are bit for bit those of int4_dot.h.
//
//   A, signed bytes: digits of x. Groups of 16 rows of x make D tiles: tile row a % 16 of tile a /
//   16
//      holds digit a % D of row a / D, so that a short last group has no more tiles than it needs.
//   B, signed bytes: codes - zeros. A quad of the kernel layout (int4_tile.h), unpacked, is a tile
//      row already: dword n holds four columns of row n.
//
// Converting the sums to floats costs about as much as the tile instructions, on other ports: the
// sums of a unit (16 rows of x by 16 of w) are added while the next unit is multiplied.
#pragma once

#include "amx.h"
#include "digits.h"
#include "w4a16_block.h"

#ifdef __AMX_INT8__

namespace llmkern::LLMKERN_ISA {
namespace {

// Rows of x that pass over a block's tiles together: accumulators, digits of a chunk and codes fill
// the L1 cache.
constexpr int64_t kAmxPanel = 128;

struct AmxDigits {
  int8_t* x;      // [groups of 16 rows][K / step][16 * D][step]
  float* scales;  // [rows][chunks]
  int64_t rows, K, columns, chunks, step;

  static int64_t bytes(int64_t rows, int64_t K, int64_t chunks, int D) {
    return (rows + kTileRows - 1) / kTileRows * kTileRows * K * D + rows * chunks * 4;
  }
};

template <int D>
void split_row(const W4A16GemmParams& p, int64_t m0, const AmxDigits& digits, int64_t m) {
  const int64_t n = digits.columns, step = digits.step, a = m % kTileRows * D;
  int8_t* group = digits.x + m / kTileRows * kTileRows * D * digits.K;
  const RowScale row = D == 1 ? row_scale(p, m0 + m, n) : RowScale{};
  for (int64_t c = 0; c < digits.chunks; ++c) {
    alignas(64) float x[kMaxChunk];
    ChunkDigits<D> chunk;
    to_float(p.x, (m0 + m) * p.x_stride + c * n, p.dtype, n, x);
    split_chunk(x, n, row, chunk);
    digits.scales[m * digits.chunks + c] = chunk.scale;
    for (int64_t k = 0; k < n; k += step) {
      int8_t* block = group + (c * n + k) * kTileRows * D;
      for (int d = 0; d < D; ++d) memcpy(block + (a + d) * step, chunk.digit[d] + k, step);
    }
  }
}

// Codes minus zeros of a chunk as B tiles: [4][columns / step][step / 4][64 bytes].
struct Codes {
  alignas(64) int8_t b[kBlock * kMaxChunk];
};

inline void unpack(const Tile& tile, int64_t columns, Codes& codes) {
  __m512i zeros[4];
  for (int j = 0; j < 4; ++j)
    zeros[j] =
        _mm512_mullo_epi32(_mm512_load_si512(tile.zeros + 16 * j), _mm512_set1_epi32(0x01010101));
  const __m512i low = _mm512_set1_epi8(15);
  const int64_t quads = columns / 4;
  for (int64_t q = 0; q < quads; ++q) {
    for (int half = 0; half < 2; ++half) {
      const uint8_t* at = tile.qweight + q * kQuadBytes + half * 64;
      __builtin_prefetch(at + 4096, 0, 2);  // into L2: see int4_dot.h
      const __m512i packed = _mm512_loadu_si512(at);
      int8_t* to = codes.b + (2 * half * quads + q) * 64;
      _mm512_store_si512(to, _mm512_sub_epi8(_mm512_and_si512(packed, low), zeros[2 * half]));
      _mm512_store_si512(to + quads * 64,
                         _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(packed, 4), low),
                                         zeros[2 * half + 1]));
    }
  }
}

// The integer sums of up to 16 rows of x with 16 rows of w (64 if D = 1, where tile registers are
// left for them) over a chunk, and where they go.
template <int D>
struct Unit {
  static constexpr int kWide = D == 1 ? 4 : 1;
  alignas(64) int32_t sums[kWide][kTileRows * D][16];
  const float* scales;    // of the rows of w
  const float* x_scales;  // of the rows of x, `chunks` apart
  float* acc;             // rows kBlock apart
  int64_t rows, chunks;
};

template <int D, int TILES>
inline void dot_unit(const int8_t* a, const int8_t* b, int64_t steps, int64_t step, Unit<D>& unit) {
  tile_zero<0>();
  if constexpr (TILES > 1) tile_zero<1>();
  if constexpr (TILES > 2) tile_zero<2>();
  if constexpr (TILES > 3) tile_zero<3>();
  for (int64_t s = 0; s < steps; ++s) {
    tile_load<6>(b + s * step * 16, 64);
    tile_load<4>(a, step);
    tile_dot<0, 4, 6>();
    if constexpr (TILES > 1) tile_load<5>(a + 16 * step, step), tile_dot<1, 5, 6>();
    if constexpr (TILES > 2) tile_load<4>(a + 32 * step, step), tile_dot<2, 4, 6>();
    if constexpr (TILES > 3) tile_load<5>(a + 48 * step, step), tile_dot<3, 5, 6>();
    a += 16 * D * step;
  }
  tile_store<0>(unit.sums[0][0], 64);
  if constexpr (TILES > 1) tile_store<1>(unit.sums[0][16], 64);
  if constexpr (TILES > 2) tile_store<2>(unit.sums[0][32], 64);
  if constexpr (TILES > 3) tile_store<3>(unit.sums[0][48], 64);
}

inline void dot_wide(const int8_t* a, const int8_t* b, int64_t steps, int64_t step, Unit<1>& unit) {
  const int64_t next = steps * step * 16;
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (int64_t s = 0; s < steps; ++s, a += 16 * step, b += 16 * step) {
    tile_load<4>(a, step);
    tile_load<6>(b, 64), tile_dot<0, 4, 6>();
    tile_load<7>(b + next, 64), tile_dot<1, 4, 7>();
    tile_load<6>(b + 2 * next, 64), tile_dot<2, 4, 6>();
    tile_load<7>(b + 3 * next, 64), tile_dot<3, 4, 7>();
  }
  tile_store<0>(unit.sums[0], 64), tile_store<1>(unit.sums[1], 64);
  tile_store<2>(unit.sums[2], 64), tile_store<3>(unit.sums[3], 64);
}

template <int D>
inline void dot_unit(int64_t tiles, const int8_t* a, const int8_t* b, int64_t steps, int64_t step,
                     Unit<D>& unit) {
  if constexpr (D == 1) return dot_wide(a, b, steps, step, unit);
  if (tiles == 1) return dot_unit<D, 1>(a, b, steps, step, unit);
  if constexpr (D > 1)
    if (tiles == 2) return dot_unit<D, 2>(a, b, steps, step, unit);
  if constexpr (D > 2)
    if (tiles == 3) return dot_unit<D, 3>(a, b, steps, step, unit);
  if constexpr (D > 3) dot_unit<D, 4>(a, b, steps, step, unit);
}

// acc += scales * (the digits' sums put together).
template <int D>
inline void accumulate(const Unit<D>& unit) {
  const __m512 high = _mm512_set1_ps(65536.f);
  const auto floats = [](__m512i v) { return _mm512_maskz_cvtepi32_ps(0xffff, v); };
  for (int j = 0; j < Unit<D>::kWide; ++j) {
    const __m512 scales = _mm512_loadu_ps(unit.scales + 16 * j);
    for (int64_t r = 0; r < unit.rows; ++r) {
      const int32_t (*sums)[16] = unit.sums[j] + r * D;
      const auto pair = [=](int d) {
        const __m512i upper = _mm512_maskz_slli_epi32(0xffff, _mm512_load_si512(sums[d + 1]), 8);
        return floats(_mm512_add_epi32(_mm512_load_si512(sums[d]), upper));
      };
      __m512 sum;
      if constexpr (D == 1) sum = floats(_mm512_load_si512(sums[0]));
      if constexpr (D == 3)
        sum = _mm512_fmadd_ps(floats(_mm512_load_si512(sums[2])), high, pair(0));
      if constexpr (D == 4) sum = _mm512_fmadd_ps(pair(2), high, pair(0));
      const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(unit.x_scales[r * unit.chunks]));
      float* acc = unit.acc + r * kBlock + 16 * j;
      _mm512_store_ps(acc, _mm512_fmadd_ps(scale, sum, _mm512_load_ps(acc)));
    }
  }
}

// Columns n0 .. n0 + 63 of the output for rows `first` .. `last` of the digits.
template <int D>
void multiply_block(const W4A16GemmParams& p, const AmxDigits& digits, int64_t m0, int64_t n0,
                    int64_t first, int64_t last) {
  const int64_t columns = digits.columns, step = digits.step, steps = columns / step;
  alignas(64) float acc[kAmxPanel * kBlock];
  memset(acc, 0, (last - first) * kBlock * sizeof(float));
  Tile tiles[2];  // two: a unit's scales are read while the next chunk's are loaded
  start_block(p.w, n0, tiles[0]);
  start_block(p.w, n0, tiles[1]);
  Codes codes;
  Unit<D> units[2];
  int64_t done = 0;
  for (int64_t c = 0; c < digits.chunks; ++c) {
    Tile& tile = tiles[c % 2];
    load_tile(p.w, n0, c * columns, columns, tile);
    unpack(tile, columns, codes);
    for (int64_t row = first; row < last; row += kTileRows) {
      const int64_t rows = min_of(kTileRows, last - row);
      const int8_t* a = digits.x + (row * digits.K + c * columns * kTileRows) * D;
      for (int j = 0; j < 4; j += Unit<D>::kWide, ++done) {
        Unit<D>& unit = units[done % 2];
        dot_unit<D>((rows * D + 15) / 16, a, codes.b + j * columns * 16, steps, step, unit);
        if (done) accumulate(units[1 - done % 2]);
        unit.scales = tile.scales + 16 * j;
        unit.x_scales = digits.scales + row * digits.chunks + c;
        unit.acc = acc + (row - first) * kBlock + 16 * j;
        unit.rows = rows;
        unit.chunks = digits.chunks;
      }
    }
  }
  if (done) accumulate(units[1 - done % 2]);
  store_block(p, acc, m0 + first, last - first, n0);
}

template <int D>
void multiply_amx(const W4A16GemmParams& p) {
  const int64_t K = p.w.K, columns = chunk_columns(p.w.group_size), chunks = K / columns;
  const int64_t step = columns % 64 ? 32 : 64;
  const int64_t rows = min_of(
      p.M, (kWorkspaceBytes / (AmxDigits::bytes(kAmxPanel, K, chunks, D) + 1) + 1) * kAmxPanel);
  const Buffer<int8_t> buffer(AmxDigits::bytes(rows, K, chunks, D));
  const TileShape c = {16, 64}, a = {16, step}, b = {step / 4, 64};
  for (int64_t m0 = 0; m0 < p.M; m0 += rows) {
    const int64_t count = min_of(rows, p.M - m0), padded = (count + 15) / 16 * 16;
    int8_t* x = buffer.data();
    const AmxDigits digits = {
        x, reinterpret_cast<float*>(x + padded * K * D), count, K, columns, chunks, step};
    const Pieces pieces(count, kAmxPanel, p.w.N);
#pragma omp parallel for schedule(static) if (count * K >= kParallelSplit)
    for (int64_t m = 0; m < count; ++m) split_row<D>(p, m0, digits, m);
#pragma omp parallel if (count * p.w.N * K >= kParallelWork)
    {
      const TileConfig config({c, c, c, c, a, a, b, b});
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < pieces.count; ++i)
        multiply_block<D>(p, digits, m0, pieces.n0(i), pieces.first(i), pieces.last(i));
    }
  }
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
#endif
