// w4a16_gemm on AMX for bfloat16 x: tiles of x times tiles of codes - zeros, which are exact in
// bfloat16 too, so that products are exact and the sums of a chunk are float32's. A chunk's sum
// enters the float32 accumulator once, times scale, in ascending k: a row's result depends on
// neither its neighbours nor the threads, nor on M while M is served by this form.
//
//   A [16 rows of x][32 columns]       B [16 pairs of columns][16 rows of w][2]
//
// Subnormal elements of x count as 0, as AMX has it.
#pragma once

#include "amx.h"
#include "w4a16_bf16_codes.h"
#include "w4a16_block.h"

#ifdef __AMX_BF16__

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int64_t kStep = 32;  // columns per tile
// Rows of x that pass over a block's tiles together: their accumulators stay in the L1 cache.
constexpr int64_t kBf16Panel = 128;

struct PackedRows {
  const uint16_t* x;  // [groups of 16 rows][K / 32][16][32], zeros beyond the last row
  int64_t rows, K;

  const uint16_t* at(int64_t row, int64_t k) const { return x + row * K + k * kTileRows; }
};

// Columns of a quad are taken in the order of `column_order`.
inline void pack_group(const W4A16GemmParams& p, int64_t m0, int64_t rows, uint16_t* out) {
  const __m512i permutation = column_order();
  for (int64_t r = 0; r < kTileRows; ++r) {
    const uint16_t* from = static_cast<const uint16_t*>(p.x) + (m0 + r) * p.x_stride;
    for (int64_t k = 0; k < p.w.K; k += kStep) {
      const __m512i x = r < rows ? _mm512_loadu_si512(from + k) : _mm512_setzero_si512();
      _mm512_store_si512(out + k * kTileRows + r * kStep, _mm512_permutexvar_epi16(permutation, x));
    }
  }
}

// The sums over a chunk of four tiles (two of x by two of w, or one by four) and where they go.
// Tile registers 0 .. 3 hold the sums of a unit; they are stored when the next one begins and added
// to the accumulators between its tile instructions, which use other ports.
struct Bf16Unit {
  alignas(64) float sums[4][kTileRows][16];
  const float* scales;
  float* acc;  // rows kBlock apart
  int64_t rows;
  bool pair;

  void add(int t) const {
    const int i = pair ? t / 2 : 0, j = pair ? t % 2 : t;
    const __m512 s = _mm512_loadu_ps(scales + 16 * j);
    float* to = acc + i * kTileRows * kBlock + 16 * j;
    const int64_t count = min_of(rows - i * kTileRows, kTileRows);
    for (int64_t r = 0; r < count; ++r, to += kBlock)
      _mm512_store_ps(to, _mm512_fmadd_ps(s, _mm512_load_ps(sums[t][r]), _mm512_load_ps(to)));
  }
};

// 32 columns of a unit; FIRST: of its chunk, where the previous unit's sums leave the registers.
template <bool PAIR, bool FIRST>
inline void dot_step(const uint16_t* a, int64_t a_next, const uint16_t* b, int64_t b_next,
                     Bf16Unit& previous) {
  tile_load<4>(a, 64);
  tile_load<6>(b, 64);
  if (FIRST) tile_store<0>(previous.sums[0], 64), tile_zero<0>();
  tile_dot_bf16<0, 4, 6>();
  tile_load<7>(b + b_next, 64);
  if (FIRST) tile_store<1>(previous.sums[1], 64), tile_zero<1>();
  tile_dot_bf16<1, 4, 7>();
  if (PAIR)
    tile_load<5>(a + a_next, 64);
  else
    tile_load<6>(b + 2 * b_next, 64);
  if (FIRST) tile_store<2>(previous.sums[2], 64), tile_zero<2>();
  if (PAIR)
    tile_dot_bf16<2, 5, 6>();
  else
    tile_dot_bf16<2, 4, 6>(), tile_load<7>(b + 3 * b_next, 64);
  if (FIRST) tile_store<3>(previous.sums[3], 64), tile_zero<3>();
  if (PAIR)
    tile_dot_bf16<3, 5, 7>();
  else
    tile_dot_bf16<3, 4, 7>();
}

template <bool PAIR>
inline void dot_unit(const uint16_t* a, int64_t a_next, const uint16_t* b, int64_t b_next,
                     int64_t steps, Bf16Unit& previous) {
  dot_step<PAIR, true>(a, a_next, b, b_next, previous);
  int added = 0;
  for (int64_t s = 1; s < steps; ++s) {
    dot_step<PAIR, false>(a + s * 512, a_next, b + s * 512, b_next, previous);
    previous.add(added++);
  }
  while (added < 4) previous.add(added++);
}

// Columns n0 .. n0 + 63 of the output for rows `first` .. `last`.
inline void multiply_block(const W4A16GemmParams& p, const PackedRows& x, int64_t m0, int64_t n0,
                           int64_t first, int64_t last) {
  const int64_t columns = chunk_columns(p.w.group_size), steps = columns / kStep;
  const int64_t b_next = columns * 16, a_next = kTileRows * x.K;
  alignas(64) float acc[kBf16Panel * kBlock];
  memset(acc, 0, (last - first) * kBlock * sizeof(float));
  Tile tiles[2];  // two: a unit's scales are read while the next chunk's are loaded
  start_block(p.w, n0, tiles[0]);
  start_block(p.w, n0, tiles[1]);
  Bf16Codes codes;
  Bf16Unit unit;
  unit.scales = tiles[0].scales, unit.acc = acc, unit.rows = 0, unit.pair = false;
  for (int64_t c = 0; c * columns < x.K; ++c) {
    Tile& tile = tiles[c % 2];
    load_tile(p.w, n0, c * columns, columns, tile);
    unpack(tile, columns, !p.w.zeros, codes);
    for (int64_t row = first; row < last; row += 2 * kTileRows) {
      const uint16_t* a = x.at(row, c * columns);
      const bool pair = last - row > kTileRows;
      for (int j = 0; j < 4; j += pair ? 2 : 4) {
        const uint16_t* b = codes.b + j * b_next;
        if (pair)
          dot_unit<true>(a, a_next, b, b_next, steps, unit);
        else
          dot_unit<false>(a, a_next, b, b_next, steps, unit);
        unit.scales = tile.scales + 16 * j;
        unit.acc = acc + (row - first) * kBlock + 16 * j;
        unit.rows = last - row;
        unit.pair = pair;
      }
    }
  }
  tile_store<0>(unit.sums[0], 64), tile_store<1>(unit.sums[1], 64);
  tile_store<2>(unit.sums[2], 64), tile_store<3>(unit.sums[3], 64);
  for (int t = 0; t < 4; ++t) unit.add(t);
  store_block(p, acc, m0 + first, last - first, n0);
}

inline void multiply_amx_bf16(const W4A16GemmParams& p) {
  const int64_t K = p.w.K;
  const int64_t rows = min_of(p.M, (kWorkspaceBytes / (kBf16Panel * K * 2 + 1) + 1) * kBf16Panel);
  const int64_t padded = (rows + kTileRows - 1) / kTileRows * kTileRows;
  const Buffer<uint16_t> buffer(padded * K);
  uint16_t* packed = buffer.data();
  const TileShape t = {16, 64};
  for (int64_t m0 = 0; m0 < p.M; m0 += rows) {
    const int64_t count = min_of(rows, p.M - m0);
    const Pieces pieces(count, kBf16Panel, p.w.N);
#pragma omp parallel for schedule(static) if (count * K >= kParallelSplit)
    for (int64_t m = 0; m < count; m += kTileRows) pack_group(p, m0 + m, count - m, packed + m * K);
#pragma omp parallel if (count * p.w.N * K >= kParallelWork)
    {
      const TileConfig config({t, t, t, t, t, t, t, t});
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < pieces.count; ++i)
        multiply_block(p, {packed, count, K}, m0, pieces.n0(i), pieces.first(i), pieces.last(i));
    }
  }
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
#endif
