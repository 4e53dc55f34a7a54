// Products of 2:4 sparse weights with rows of x, block by block, never expanding the weight.
//
// A block is 16 rows of w, as llmkern/formats/sparse24_cpu.py stores them: for each group of 4
// columns, the two kept values of every row, and per 32 columns a word of metadata of every row.
// The rows are the lanes of vectors. A lane takes its two columns of x out of the group's four by a
// permutation that reads its index from the metadata as it is:
//
//   floats   acc += first * choose(x, nibble & 3);  acc += second * choose(x, nibble >> 2)
//            the permutation (vpermilps) reads two bits, so the word shifted is the index
//   dots     acc += first * x[nibble & 3] + second * x[nibble >> 2]       (vdpbf16ps, bfloat16 x)
//            the 16 pairs that a nibble can name are made once per group of x (vpermw); a lane's
//            nibble chooses one of them (vpermd reads four bits)
//
// A dense product takes 4 (2) multiplications where this takes 2 (1) and as many permutations.
// A sum runs over at most kPanelCols columns from 0, in ascending order, and is then added, times
// the scale where there is one, to the output's: so a row of y depends on nothing but its row of x,
// the weight and the instruction set.
#pragma once

#include "common/buffer.h"
#include "common/tile.h"
#include "convert.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the packed layouts are little endian");

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int64_t kBlockRows = 16;
constexpr int64_t kWordCols = 32;  // columns per word of metadata
constexpr int64_t kGroups = 8;     // groups per word of metadata
constexpr int64_t kPanelCols = 128;
constexpr int64_t kPanelWords = kPanelCols / kWordCols;
constexpr int kParts = int(kBlockRows) / kLanes;  // vectors per block
// Blocks that pass over C rows of x together: as many as the registers hold sums of.
template <int C>
constexpr int kSharing = kLanes == 16 || C < 4 ? 4 : 2;

typedef int32_t Ints __attribute__((vector_size(kVecBytes), may_alias));

inline Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline Ints load(const int32_t* p) {
  Ints v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }
inline Vec as_floats(Ints v) {
  Vec f;
  memcpy(&f, &v, sizeof f);
  return f;
}

// Four columns of x, in every four lanes, and each lane's choice by the low two bits of its index.
#if defined(__AVX512F__)
inline Vec spread(const float* x) { return _mm512_maskz_broadcast_f32x4(0xffff, _mm_loadu_ps(x)); }
inline Vec choose(Vec x, Ints index) {
  return _mm512_maskz_permutevar_ps(0xffff, x, reinterpret_cast<__m512i>(index));
}
#elif defined(__AVX__)
inline Vec spread(const float* x) {
  return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x));
}
inline Vec choose(Vec x, Ints index) {
  return _mm256_permutevar_ps(x, reinterpret_cast<__m256i>(index));
}
#else
inline Vec spread(const float* x) { return load(x); }
inline Vec choose(Vec x, Ints index) {
  return Vec{x[index[0] & 3], x[index[1] & 3], x[index[2] & 3], x[index[3] & 3]};
}
#endif

// What a panel of a block is multiplied from: kept values as they are stored.
template <DType kType>
struct Values {
  static constexpr bool kScaled = false;
  const void* values;   // [groups][32]
  const int32_t* meta;  // [words][16]

  // A part of the rows: kLanes of them.
  struct Part {
    const char* at;

    void kept(int64_t word, int g, Vec& first, Vec& second) const {
      const int64_t group = word * kGroups + g;
      if constexpr (kType == DType::kFloat32) {
        const float* pair = reinterpret_cast<const float*>(at) + group * 2 * kBlockRows;
        first = load(pair);
        second = load(pair + kBlockRows);
      } else if constexpr (kType == DType::kBFloat16) {
        const int32_t* pairs = reinterpret_cast<const int32_t*>(at) + group * kBlockRows;
        const Ints words = load(pairs);
        first = as_floats(words << 16);
        second = as_floats(words & int32_t(0xffff0000));
      } else {
        const uint16_t* pair = reinterpret_cast<const uint16_t*>(at) + group * 2 * kBlockRows;
        first = halves(pair);
        second = halves(pair + kBlockRows);
      }
    }

    static Vec halves(const uint16_t* p) {
#if defined(__AVX512F__)
      return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
      float f[kLanes];
      to_float(p, 0, DType::kFloat16, kLanes, f);
      return load(f);
#endif
    }
  };

  Part part(int i) const {
    const int lane_bytes = kType == DType::kFloat16 ? 2 : 4;
    return {static_cast<const char*>(values) + i * kLanes * lane_bytes};
  }
  Vec scale(int) const { return splat(1); }

#ifdef __AVX512BF16__
  __m512i pairs(int64_t word, int g) const {
    const int32_t* at = static_cast<const int32_t*>(values);
    return _mm512_loadu_si512(at + (word * kGroups + g) * kBlockRows);
  }
#endif
};

// Codes of 4 bits. With its nibble in the low bits of 2^23's mantissa, a code i places up is the
// number 2^23 + 16^i * code: a subtraction leaves 16^i * (code - zero), exactly, and x has been
// divided by 16^i.
constexpr float kMagic = 0x1p23f;
constexpr int32_t kMagicBits = 0x4b000000;

#ifdef __AVX512BF16__
// -8 .. 7 as bfloat16, twice.
alignas(64) constexpr uint16_t kSteps[32] = {
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0,      0x3f80, 0x4000,
    0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
    0xc000, 0xbf80, 0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
#endif

template <bool kZeros>
struct Codes {
  static constexpr bool kScaled = true;
  const int32_t* words;  // [columns / 16][16]
  const int32_t* meta;   // [columns / 32][16]
  const float* scales;   // [16]
  const float* zeros;    // [16], if kZeros

  struct Part {
    const int32_t* words;
    Vec centres[4];  // 2^23 + 16^i * zero

    void kept(int64_t word, int g, Vec& first, Vec& second) const {
      const int i = g % 4;
      const Ints codes = load(words + (2 * word + g / 4) * kBlockRows);
      const Ints magic = kMagicBits - Ints{};
      first = as_floats((codes & (15 << 4 * i)) | magic) - centres[i];
      second = as_floats((codes >> 16 & (15 << 4 * i)) | magic) - centres[i];
    }
  };

  Part part(int i) const {
    Part part = {words + i * kLanes, {}};
    const Vec zero = kZeros ? load(zeros + i * kLanes) : splat(8);
    for (int place = 0; place < 4; ++place)
      part.centres[place] = zero * float(1 << 4 * place) + kMagic;
    return part;
  }
  Vec scale(int i) const { return load(scales + i * kLanes); }

#ifdef __AVX512BF16__
  // Code - 8 as bfloat16. The permutation reads five bits: a nibble, and one of the next.
  __m512i pairs(int64_t word, int g) const {
    const __m512i codes = _mm512_loadu_si512(words + (2 * word + g / 4) * kBlockRows);
    return _mm512_maskz_permutexvar_epi16(~__mmask32(0),
                                          _mm512_maskz_srli_epi32(0xffff, codes, g % 4 * 4),
                                          _mm512_load_si512(kSteps));
  }
#endif
};

// Rows of x that pass over a panel, `stride` elements apart, zero up to a multiple of kWordCols.
struct Floats {
  using Element = float;
  const float* x;
  int64_t stride;
};

// sums[c][r * 16 ..] += the products of R blocks with C rows of x over `words` words of columns.
template <int R, int C, typename Weight>
inline void multiply_tile(const Weight* blocks, int64_t words, const Floats& x, float* sums,
                          int64_t sums_stride) {
  for (int i = 0; i < kParts; ++i) {
    typename Weight::Part parts[R];
    for (int r = 0; r < R; ++r) parts[r] = blocks[r].part(i);
    Vec acc[C][R] = {};
    for (int64_t word = 0; word < words; ++word) {
      Ints meta[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        meta[r] = load(blocks[r].meta + word * kBlockRows + i * kLanes);
      }
#pragma GCC unroll 8
      for (int g = 0; g < kGroups; ++g) {
        Vec columns[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c)
          columns[c] = spread(x.x + c * x.stride + (word * kGroups + g) * 4);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          Vec first, second;
          parts[r].kept(word, g, first, second);
          const Ints low = meta[r] >> (4 * g), high = meta[r] >> (4 * g + 2);
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) acc[c][r] += first * choose(columns[c], low);
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) acc[c][r] += second * choose(columns[c], high);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        float* sum = sums + c * sums_stride + r * kBlockRows + i * kLanes;
        const Vec part = Weight::kScaled ? acc[c][r] * blocks[r].scale(i) : acc[c][r];
        store(sum, load(sum) + part);
      }
  }
}

#ifdef __AVX512BF16__
struct Halves {
  using Element = uint16_t;
  const uint16_t* x;
  int64_t stride;
};

// Word i of lane n: the column that nibble n names first (i = 0) or second, in group g of 32
// columns.
struct PairIndex {
  alignas(64) uint16_t column[kGroups][32] = {};
  constexpr PairIndex() {
    for (int g = 0; g < kGroups; ++g)
      for (int n = 0; n < 16; ++n) {
        column[g][2 * n] = uint16_t(4 * g + n % 4);
        column[g][2 * n + 1] = uint16_t(4 * g + n / 4);
      }
  }
};
constexpr PairIndex kPairIndex;

template <int R, int C, typename Weight>
inline void multiply_tile(const Weight* blocks, int64_t words, const Halves& x, float* sums,
                          int64_t sums_stride) {
  __m512 acc[C][R] = {};
  for (int64_t word = 0; word < words; ++word) {
    __m512i meta[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) meta[r] = _mm512_loadu_si512(blocks[r].meta + word * kBlockRows);
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) {
      __m512i columns[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c)
        columns[c] = _mm512_maskz_permutexvar_epi16(
            ~__mmask32(0), _mm512_load_si512(kPairIndex.column[g]),
            _mm512_loadu_si512(x.x + c * x.stride + word * kWordCols));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m512i kept = blocks[r].pairs(word, g);
        const __m512i nibble = _mm512_maskz_srli_epi32(0xffff, meta[r], unsigned(4 * g));
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c)
          acc[c][r] = _mm512_dpbf16_ps(
              acc[c][r], (__m512bh)kept,
              (__m512bh)_mm512_maskz_permutexvar_epi32(0xffff, nibble, columns[c]));
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      float* sum = sums + c * sums_stride + r * kBlockRows;
      const Vec part = Weight::kScaled ? acc[c][r] * blocks[r].scale(0) : Vec(acc[c][r]);
      store(sum, load(sum) + part);
    }
}
#endif

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
