// Reading a weight of 4-bit codes into a book, row by row, 32 codes (one unit) at a time.
//
// A unit is stored as the kernel layout of llmkern/formats/lut4_cpu.py has it: 16 bytes, byte i
// holding code i in its low and code 16 + i in its high nibble. A looked-up vector is the weight
// itself, for the book is multiplied with the scale of a group before its codes are looked up.
#pragma once

#include "common/buffer.h"
#include "common/tile.h"
#include "convert.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the packed layouts are little endian");

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int64_t kUnit = 32, kUnitBytes = 16;
constexpr int kUnitVecs = int(kUnit) / kLanes;

inline Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }

#if defined(__AVX512F__)
struct Book {
  Vec entries;
};
inline Book scaled(const float* book, float scale) { return {load(book) * scale}; }

inline void look_up(const uint8_t* unit, const Book& book, Vec* w) {
  // The permutation reads no more than the low four bits of an index. Full masks, because gcc 12
  // warns about the undefined operand of the unmasked forms.
  const __m512i codes =
      _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(unit)));
  w[0] = _mm512_maskz_permutexvar_ps(0xffff, codes, book.entries);
  w[1] =
      _mm512_maskz_permutexvar_ps(0xffff, _mm512_maskz_srli_epi32(0xffff, codes, 4), book.entries);
}
#elif defined(__AVX2__)
struct Book {
  Vec low, high;  // entries 0..7 and 8..15
};
inline Book scaled(const float* book, float scale) {
  return {load(book) * scale, load(book + 8) * scale};
}

// The permutations read the low three bits of an index; its fourth, as a sign, chooses the half.
inline Vec entries(__m256i codes, const Book& book) {
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(book.low, codes),
                          _mm256_permutevar8x32_ps(book.high, codes),
                          _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
}
inline void look_up(const uint8_t* unit, const Book& book, Vec* w) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(unit));
  const __m256i first = _mm256_cvtepu8_epi32(bytes);
  const __m256i second = _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(bytes, bytes));
  w[0] = entries(first, book);
  w[1] = entries(second, book);
  w[2] = entries(_mm256_srli_epi32(first, 4), book);
  w[3] = entries(_mm256_srli_epi32(second, 4), book);
}
#else
struct Book {
  float entries[16];
};
inline Book scaled(const float* book, float scale) {
  Book out;
  for (int i = 0; i < 16; ++i) out.entries[i] = book[i] * scale;
  return out;
}

inline void look_up(const uint8_t* unit, const Book& book, Vec* w) {
  float values[kUnit];
  for (int i = 0; i < 16; ++i) {
    values[i] = book.entries[unit[i] & 15];
    values[16 + i] = book.entries[unit[i] >> 4];
  }
  memcpy(w, values, sizeof values);
}
#endif

// The books of a row's groups.
struct RowBooks {
  const float *codebook, *scales;

  Book at(int64_t g, int64_t group_stride) const {
    return scaled(codebook + g * group_stride, scales[g]);
  }
};

// Some consecutive rows of a weight, in `Rows::scratch_floats` floats of a thread's own memory.
class Rows {
 public:
  static int64_t scratch_floats(const Lut4Weight& w, int64_t rows) {
    const int64_t codes = w.layout == Layout::kCanonical ? w.K / 8 : 0;
    return rows * (padded(w.K / w.group_size) + padded(codes));
  }

  Rows(const Lut4Weight& w, float* scratch, int64_t rows)
      : w_(w),
        groups_(w.K / w.group_size),
        scale_stride_(padded(groups_)),
        code_bytes_(padded(w.K / 8) * 4),
        scales_(scratch),
        codes_(reinterpret_cast<uint8_t*>(scratch + rows * scale_stride_)) {}

  // Rows beyond N repeat the last one.
  void load(int64_t n0, int64_t rows) {
    n0_ = n0;
    for (int64_t r = 0; r < rows; ++r) {
      float* scales = scales_ + r * scale_stride_;
      if (w_.scales)
        to_float(w_.scales, row(r) * groups_, w_.scales_dtype, groups_, scales);
      else
        for (int64_t g = 0; g < groups_; ++g) scales[g] = 1;
      if (w_.layout == Layout::kCanonical) reorder(row(r), codes_ + r * code_bytes_);
    }
  }

  const uint8_t* codes(int64_t r) const {
    if (w_.layout == Layout::kCanonical) return codes_ + r * code_bytes_;
    return static_cast<const uint8_t*>(w_.qweight) + row(r) * (w_.K / 2);
  }

  RowBooks books(int64_t r) const {
    return {w_.codebook + row(r) * w_.book_row_stride, scales_ + r * scale_stride_};
  }

  // Columns first .. last - 1, multiples of 32, of row r.
  void dequantize(int64_t r, int64_t first, int64_t last, float* out) const {
    const uint8_t* unit = codes(r) + first / 2;
    const RowBooks row_books = books(r);
    for (int64_t k = first; k < last;) {
      const int64_t g = k / w_.group_size, end = min_of(last, (g + 1) * w_.group_size);
      const Book values = row_books.at(g, w_.book_group_stride);
      for (; k < end; k += kUnit, unit += kUnitBytes, out += kUnit) {
        Vec w[kUnitVecs];
        look_up(unit, values, w);
        memcpy(out, w, sizeof w);
      }
    }
  }

 private:
  int64_t row(int64_t r) const { return min_of(n0_ + r, w_.N - 1); }

  // Codes from pairs of neighbours per byte to pairs 16 apart.
  void reorder(int64_t n, uint8_t* out) const {
    const uint8_t* in = static_cast<const uint8_t*>(w_.qweight) + n * (w_.K / 2);
    for (int64_t unit = 0; unit < w_.K / kUnit; ++unit, in += kUnitBytes, out += kUnitBytes) {
      for (int i = 0; i < 8; ++i) {
        out[2 * i] = uint8_t((in[i] & 15) | in[8 + i] << 4);
        out[2 * i + 1] = uint8_t(in[i] >> 4 | (in[8 + i] & 0xf0));
      }
    }
  }

  const Lut4Weight& w_;
  int64_t groups_, scale_stride_, code_bytes_, n0_ = 0;
  float* scales_;
  uint8_t* codes_;
};

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
