// A tile's codes - zeros in bfloat16, in which they are exact, as bfloat16 dot products and AMX
// tiles take them: pairs of columns of 16 rows of w per register.
#pragma once

#include "int4_tile.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

namespace llmkern::LLMKERN_ISA {
namespace {

// A quad's dword holds columns 0 .. 3 in its bytes, of one row of w in the low nibbles and of the
// row 16 further in the high ones. So its two 16-bit words, shifted by 0, 4, 8 or 12 bits, begin
// with the codes of columns (0, 2) or (1, 3), and a word is looked up by its low five bits.

// Permutation of 32 columns into the order 0, 2, 1, 3 of each quad.
inline __m512i column_order() {
  alignas(64) uint16_t order[32];
  for (int k = 0; k < 32; ++k) order[k] = uint16_t((k & ~3) | (k & 1) << 1 | (k & 2) >> 1);
  return _mm512_load_si512(order);
}

// bfloat16 of (i - zero) modulo 32, as -16 .. 15, or, for the low four bits of i alone, of i -
// zero.
inline __m512i code_table(bool four_bits, int zero) {
  alignas(64) uint16_t table[32];
  for (int i = 0; i < 32; ++i) {
    const int value = four_bits ? i % 16 - zero : (i + 16) % 32 - 16;
    table[i] = uint16_t(float_bits(float(value)) >> 16);
  }
  return _mm512_load_si512(table);
}

// Looks up the words of a tile: `table` is of a weight's symmetry, `zeros` of 16 rows of w.
template <bool SYMMETRIC>
struct CodeTable {
  __m512i table = code_table(SYMMETRIC, 8), low = _mm512_set1_epi16(15);

  static __m512i zeros(const int32_t* zeros) {
    return _mm512_mullo_epi32(_mm512_load_si512(zeros), _mm512_set1_epi32(0x00010001));
  }
  __m512i look_up(__m512i words, __m512i zeros) const {
    if (!SYMMETRIC) words = _mm512_sub_epi16(_mm512_and_si512(words, low), zeros);
    return _mm512_permutexvar_epi16(words, table);
  }
};

// A chunk's codes - zeros: [4][columns / 2][16][2].
struct Bf16Codes {
  alignas(64) uint16_t b[kBlock * kMaxChunk];
};

template <bool SYMMETRIC>
inline void unpack_all(const Tile& tile, int64_t columns, Bf16Codes& codes) {
  const CodeTable<SYMMETRIC> table;
  const int64_t pairs = columns / 2;
  for (int half = 0; half < 2; ++half) {
    const __m512i zeros0 = table.zeros(tile.zeros + 32 * half);
    const __m512i zeros1 = table.zeros(tile.zeros + 32 * half + 16);
    const uint8_t* from = tile.qweight + half * 64;
    uint16_t* to = codes.b + half * pairs * 64;
    for (int64_t q = 0; q < columns / 4; ++q, from += kQuadBytes, to += 64) {
      __builtin_prefetch(from + 4096, 0, 2);  // into L2: see int4_dot.h
      const __m512i packed = _mm512_loadu_si512(from);
      _mm512_store_si512(to, table.look_up(packed, zeros0));
      _mm512_store_si512(to + 32, table.look_up(_mm512_srli_epi16(packed, 8), zeros0));
      uint16_t* high = to + pairs * 32;
      _mm512_store_si512(high, table.look_up(_mm512_srli_epi16(packed, 4), zeros1));
      _mm512_store_si512(high + 32, table.look_up(_mm512_srli_epi16(packed, 12), zeros1));
    }
  }
}

inline void unpack(const Tile& tile, int64_t columns, bool symmetric, Bf16Codes& codes) {
  if (symmetric)
    unpack_all<true>(tile, columns, codes);
  else
    unpack_all<false>(tile, columns, codes);
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
#endif
