// Which columns of kRows rows are kept, as llmkern/reference/obs_prune.py defines it: the lowest
// scores go, of equal ones the lower column and then the lower row first.
//
// Masks are [columns][kRows] of -1 (kept) and 0. Scores are not negative, so their bits, read as
// integers, are in their order.
#pragma once

#include <cstring>

#include "cpu/common/tile.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int kMaxSize = 8;  // columns of an n:m group

typedef int32_t Mask __attribute__((vector_size(kVecBytes), may_alias));

inline Vec masked(Vec x, Mask keep) { return Vec(Mask(x) & keep); }

// The `kept` highest of `size` columns, scores[i] of row vector v, into keep.
inline void keep_of_every(int64_t kept, int64_t size, const Vec* scores, int v, int32_t* keep) {
  Mask rank[kMaxSize] = {};
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = i + 1; j < size; ++j) {
      const Mask later_first = scores[j] < scores[i];
      rank[i] -= later_first;
      rank[j] -= ~later_first;
    }
  for (int64_t i = 0; i < size; ++i)
    reinterpret_cast<Mask*>(keep)[i * kRowVecs + v] = rank[i] >= int32_t(size - kept);
}

// All but the `removed` lowest scores [cols][kRows] of each row.
inline void keep_per_row(const float* scores, int64_t cols, int32_t removed, int32_t* keep) {
  for (int v = 0; v < kRowVecs; ++v) {
    const Mask* bits = reinterpret_cast<const Mask*>(scores) + v;
    Mask* out = reinterpret_cast<Mask*>(keep) + v;
    // The threshold: the least number that `removed` scores do not exceed.
    Mask low = Mask{}, high = Mask{} + 0x7f800000;
    for (int step = 0; step < 31; ++step) {
      const Mask middle = low + ((high - low) >> 1);
      Mask count = Mask{};
      for (int64_t k = 0; k < cols; ++k) count -= bits[k * kRowVecs] <= middle;
      const Mask enough = count >= removed;
      high = enough ? middle : high;
      low = enough ? low : middle + 1;
    }
    Mask ties = Mask{} + removed;  // of the threshold itself that go
    for (int64_t k = 0; k < cols; ++k) ties += bits[k * kRowVecs] < high;
    for (int64_t k = 0; k < cols; ++k) {
      const Mask tie = (bits[k * kRowVecs] == high) & (ties > 0);
      ties += tie;
      out[k * kRowVecs] = ~((bits[k * kRowVecs] < high) | tie);
    }
  }
}

// Scores of all rows below the threshold go, and those at it before (column, row).
struct Threshold {
  int32_t bits;
  int64_t column, row;
};

// Scores [cols][kRows] of rows `row`.. of the matrix.
inline void keep_above(const Threshold& t, const float* scores, int64_t cols, int64_t row,
                       int32_t* keep) {
  for (int64_t k = 0; k < cols; ++k)
    for (int64_t r = 0; r < kRows; ++r) {
      int32_t bits;
      std::memcpy(&bits, scores + k * kRows + r, sizeof bits);
      const bool later = k > t.column || (k == t.column && row + r >= t.row);
      keep[k * kRows + r] = -int32_t(bits > t.bits || (bits == t.bits && later));
    }
}

// Digits of the scores' bits by which the threshold is found, the highest first.
constexpr int kDigits = 3, kShifts[kDigits] = {20, 10, 0};
constexpr int64_t kBins = 2048;

// Counts the next digit of those of the scores [cols][kRows] that share the higher digits `prefix`.
inline void count_digit(const float* scores, int64_t cols, int64_t rows, int digit, int32_t prefix,
                        int32_t* counts) {
  const int shift = kShifts[digit];
  for (int64_t k = 0; k < cols; ++k)
    for (int64_t r = 0; r < rows; ++r) {
      int32_t bits;
      std::memcpy(&bits, scores + k * kRows + r, sizeof bits);
      if (digit == 0)
        ++counts[bits >> shift];
      else if (bits >> kShifts[digit - 1] == prefix)
        ++counts[bits >> shift & 1023];
    }
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
