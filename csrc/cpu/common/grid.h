// Grids of weight groups, integers or books, as llmkern/reference/obs_quantize.py defines them, for
// kRows rows at a time.
#pragma once

#include <cstring>

#include "cpu/common/tile.h"
#include "llmkern.h"

namespace llmkern::LLMKERN_ISA {

// CLIP_STEPS and CLIP_MIN of the reference.
constexpr int kClipSteps = 20;
constexpr double kClipMin = 0.6;

// x >= 0 rounded to the nearest number of `dtype`.
inline float round_to(float x, DType dtype) {
  if (dtype == DType::kFloat32) return x;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (dtype == DType::kBFloat16) {
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  } else {
    // Below fp16's normal range its numbers are multiples of 2^-24, the spacing of floats at 0.75.
    if (x < 0x1p-14f) return (x + 0.75f) - 0.75f;
    bits = (bits + 0xfff + (bits >> 13 & 1)) & 0xffffe000u;
    if (bits > 0x477fe000u) bits = 0x7f800000u;  // beyond 65504
  }
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline Vec round_to(Vec x, DType dtype) {
  if (dtype == DType::kFloat32) return x;
  float lanes[kLanes];
  std::memcpy(lanes, &x, sizeof x);
  for (float& lane : lanes) lane = round_to(lane, dtype);
  std::memcpy(&x, lanes, sizeof x);
  return x;
}

// Integer code of x on the grid scale * (code - zero), as a float in [0, top].
inline Vec quantize(Vec x, Vec scale, Vec zero, float top) {
  // The clamp keeps round_even exact and changes no code: |code - zero| <= 255.
  const Vec steps = min_of(max_of(x / scale, splat(-1024)), splat(1024));
  return min_of(max_of(round_even(steps) + zero, Vec{}), splat(top));
}

constexpr int kBookSize = 16;

struct GridOptions {
  int bits;
  bool symmetric, clip_search;
  DType scales_dtype;
  const float* book;  // [kBookSize][kRows], ascending in each row, or null: integers

  float top() const { return float((1 << bits) - 1); }
};

struct Grid {
  Vec scale, zero;
};

struct Rounded {
  Vec code, value;
};

// x on the grid of row vector v: the nearest integer's code, or the rank of the nearest entry.
inline Rounded round_on(Vec x, const Grid& grid, const GridOptions& o, int v) {
  if (o.book == nullptr) {
    const Vec code = quantize(x, grid.scale, grid.zero, o.top());
    return {code, grid.scale * (code - grid.zero)};
  }
  const Vec* book = reinterpret_cast<const Vec*>(o.book) + v;
  const Vec place = x / grid.scale;
  Vec rank{}, entry = book[0];
  for (int i = 1; i < kBookSize; ++i) {
    const Vec next = book[i * kRowVecs];
    const auto above = place > (book[(i - 1) * kRowVecs] + next) / splat(2);
    rank = above ? splat(float(i)) : rank;
    entry = above ? next : entry;
  }
  return {rank, grid.scale * entry};
}

// What scale 1 covers between the ends of the range, for row vector v.
inline Vec steps_of(const GridOptions& o, int v) {
  if (o.book == nullptr) return splat(o.top());
  const Vec* book = reinterpret_cast<const Vec*>(o.book) + v;
  return 2 * max_of(-book[0], book[(kBookSize - 1) * kRowVecs]);
}

// Grid of the range [low, high] shrunk to `fraction`.
inline Grid shrunk_grid(Vec low, Vec high, float fraction, Vec steps, const GridOptions& o) {
  Vec scale = round_to((high - low) * fraction / steps, o.scales_dtype);
  scale = scale > Vec{} ? scale : splat(1);
  if (o.book != nullptr) return {scale, Vec{}};
  if (o.symmetric) return {scale, splat(float(1 << (o.bits - 1)))};
  Vec zero = min_of(max_of(-low * fraction / scale, splat(-1024)), splat(1024));
  return {scale, min_of(max_of(round_even(zero), Vec{}), splat(o.top()))};
}

inline Vec squared_error(const Vec* w, int64_t size, const Grid& grid, const GridOptions& o,
                         int v) {
  Vec sum{};
  for (int64_t k = 0; k < size; ++k) {
    const Vec x = w[k * kRowVecs];
    const Vec diff = round_on(x, grid, o, v).value - x;
    sum += diff * diff;
  }
  return sum;
}

// Grids of kRows groups, w [size][kRows], into scales [kRows] and zeros [kRows].
inline void group_grid(const float* w, int64_t size, const GridOptions& o, float* scales,
                       float* zeros) {
  for (int v = 0; v < kRowVecs; ++v) {
    const Vec* x = reinterpret_cast<const Vec*>(w) + v;
    const Vec steps = steps_of(o, v);
    Vec low{}, high{};
    for (int64_t k = 0; k < size; ++k) {
      low = min_of(x[k * kRowVecs], low);
      high = max_of(x[k * kRowVecs], high);
    }
    if (o.symmetric || o.book != nullptr) {
      high = max_of(-low, high);
      low = -high;
    }
    Grid grid = shrunk_grid(low, high, 1, steps, o);
    if (o.clip_search) {
      Vec best = squared_error(x, size, grid, o, v);
      for (int step = 1; step < kClipSteps; ++step) {
        const double fraction = 1 - (1 - kClipMin) * step / (kClipSteps - 1);
        const Grid candidate = shrunk_grid(low, high, float(fraction), steps, o);
        const Vec error = squared_error(x, size, candidate, o, v);
        const auto better = error < best;
        best = better ? error : best;
        grid.scale = better ? candidate.scale : grid.scale;
        grid.zero = better ? candidate.zero : grid.zero;
      }
    }
    reinterpret_cast<Vec*>(scales)[v] = grid.scale;
    reinterpret_cast<Vec*>(zeros)[v] = grid.zero;
  }
}

}  // namespace llmkern::LLMKERN_ISA
