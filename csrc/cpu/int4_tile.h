// Reading a 4-bit weight by tiles of 64 rows (N) and up to 128 columns (K), from either layout.
//
// A tile is stored as the kernel layout of llmkern/formats/int4_cpu.py has it: 128 bytes per 4
// columns; dword c (0..31) of them holds, in byte i, the codes of column 4q + i: that of row
// 32 * (c / 16) + c % 16 in the low nibble and that of the row 16 further in the high nibble.
#pragma once

#include "common/integers.h"
#include "convert.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the packed layouts are little endian");

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int64_t kBlock = 64;
constexpr int64_t kMaxChunk = 128;
constexpr int64_t kQuadBytes = 128;

// Columns per tile: a divisor of the group, so that a tile has one scale per row.
inline int64_t chunk_columns(int64_t group_size) {
  int64_t chunk = kMaxChunk;
  while (group_size % chunk) chunk -= 32;
  return chunk;
}

struct alignas(64) Tile {
  uint8_t repacked[kMaxChunk * kBlock / 2];
  float scales[kBlock];    // 0 beyond N
  int32_t zeros[kBlock];   // 0 beyond N
  const uint8_t* qweight;  // [columns / 4][kQuadBytes]
};

// Four nibbles into the low nibbles of four bytes.
inline uint32_t spread(uint32_t x) {
  return (x & 0xf) | (x & 0xf0) << 4 | (x & 0xf00) << 8 | (x & 0xf000) << 12;
}

inline void repack(const Int4Weight& w, int64_t n0, int64_t k0, int64_t columns, Tile& tile) {
  const uint16_t* quads = static_cast<const uint16_t*>(w.qweight);
  const int64_t row_quads = w.K / 4;
  uint32_t* out = reinterpret_cast<uint32_t*>(tile.repacked);
  for (int64_t c = 0; c < 32; ++c) {
    const int64_t low = n0 + 32 * (c / 16) + c % 16, high = low + 16;
    for (int64_t q = 0; q < columns / 4; ++q) {
      uint32_t word = 0;
      if (low < w.N) word = spread(quads[low * row_quads + k0 / 4 + q]);
      if (high < w.N) word |= spread(quads[high * row_quads + k0 / 4 + q]) << 4;
      out[q * 32 + c] = word;
    }
  }
}

inline void load_canonical(const Int4Weight& w, int64_t n0, int64_t k0, int64_t columns,
                           Tile& tile) {
  const int64_t groups = w.K / w.group_size, g = k0 / w.group_size;
  const int32_t* zeros = static_cast<const int32_t*>(w.zeros);
  for (int64_t c = 0; c < min_of(kBlock, w.N - n0); ++c) {
    const int64_t n = n0 + c;
    to_float(w.scales, n * groups + g, w.scales_dtype, 1, tile.scales + c);
    if (zeros) tile.zeros[c] = uint32_t(zeros[n / 8 * groups + g]) >> (4 * (n % 8)) & 15;
  }
  repack(w, n0, k0, columns, tile);
  tile.qweight = tile.repacked;
}

inline void load_packed(const Int4Weight& w, int64_t n0, int64_t k0, Tile& tile) {
  const int64_t at = k0 / w.group_size * w.N + n0, count = min_of(kBlock, w.N - n0);
  // The next groups' scales lie rows of N further, where no hardware prefetcher looks; those of the
  // very next group are wanted too soon to be fetched only now.
  const int64_t ahead = at + 2 * w.N, scale_bytes = w.scales_dtype == DType::kFloat32 ? 4 : 2;
  const char* next = static_cast<const char*>(w.scales) + ahead * scale_bytes;
  for (int64_t line = 0; line < kBlock * scale_bytes; line += 64) __builtin_prefetch(next + line);
  to_float(w.scales, at, w.scales_dtype, count, tile.scales);
  if (w.zeros) {
    const uint8_t* zeros = static_cast<const uint8_t*>(w.zeros) + at;
    __builtin_prefetch(zeros + 2 * w.N);
    for (int64_t c = 0; c < count; ++c) tile.zeros[c] = zeros[c];
  }
  tile.qweight = static_cast<const uint8_t*>(w.qweight) + n0 * w.K / 2 + k0 * kBlock / 2;
}

// Once per block, before its tiles are loaded.
inline void start_block(const Int4Weight& w, int64_t n0, Tile& tile) {
  for (int64_t c = 0; c < kBlock; ++c) {
    tile.scales[c] = 0;
    tile.zeros[c] = !w.zeros && n0 + c < w.N ? 8 : 0;
  }
}

inline void load_tile(const Int4Weight& w, int64_t n0, int64_t k0, int64_t columns, Tile& tile) {
  if (w.layout == Layout::kCpu)
    load_packed(w, n0, k0, tile);
  else
    load_canonical(w, n0, k0, columns, tile);
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
