// Square tiles on and below the diagonal of a symmetric matrix, numbered row by row, and the rows
// of x that belong to an expert.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "llmkern.h"

namespace llmkern::cuda {

// In `rows` rows of tiles.
constexpr int64_t lower_tiles(int64_t rows) { return rows * (rows + 1) / 2; }

struct LowerTile {
  int row, column;
};

// number = row (row + 1) / 2 + column, below 2^31.
__device__ __forceinline__ LowerTile lower_tile(unsigned number) {
  const int64_t n = number;
  // The square root in float32 may be off by one.
  int64_t row = static_cast<int64_t>((sqrtf(8.0f * static_cast<float>(number) + 1.0f) - 1.0f) / 2);
  while (row * (row + 1) / 2 > n) row--;
  while ((row + 1) * (row + 2) / 2 <= n) row++;
  return {static_cast<int>(row), static_cast<int>(n - row * (row + 1) / 2)};
}

struct Rows {
  int64_t begin, end;
};

// Of x. Offsets out of order or range give fewer rows, never ones outside x.
__device__ __forceinline__ Rows rows_of(const HessianUpdateParams& p, int64_t expert) {
  if (!p.offsets) return {expert * p.T, (expert + 1) * p.T};
  const int64_t begin = max(p.offsets[expert], int64_t{0});
  return {begin, max(min(p.offsets[expert + 1], p.T), begin)};
}

}  // namespace llmkern::cuda
