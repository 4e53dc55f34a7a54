// Reading a 4-bit weight in the canonical layout (picture in llmkern/formats/int4.py).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/dtype.cuh"
#include "llmkern.h"

namespace llmkern::cuda {

// Scale and zero point of one group of one row.
struct GroupGrid {
  float scale, zero;
};

__device__ __forceinline__ GroupGrid load_grid(const Int4Weight& w, int64_t n, int64_t g) {
  const int64_t groups = w.K / w.group_size;
  GroupGrid grid = {load_as(w.scales, n * groups + g, w.scales_dtype), 8.0f};
  if (w.zeros) {
    const uint32_t word = static_cast<const uint32_t*>(w.zeros)[n / 8 * groups + g];
    grid.zero = static_cast<float>(word >> (n % 8 * 4) & 15);
  }
  return grid;
}

// The eight codes of a word minus the zero point: exact in float.
__device__ __forceinline__ void unpack8(uint32_t word, float zero, float (&out)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i++) out[i] = static_cast<float>(word >> (4 * i) & 15) - zero;
}

// As code_rows.cuh describes it.
template <typename Weight>
struct CodeRows;

template <>
struct CodeRows<Int4Weight> {
  static constexpr int kBookEntries = 1;
  using Group = GroupGrid;

  static __device__ __forceinline__ void enter_row(const Int4Weight&, float*, int64_t) {}
  static __device__ __forceinline__ Group enter_group(const Int4Weight& w, float*, int64_t n,
                                                      int64_t g) {
    return load_grid(w, n, g);
  }
  static __device__ __forceinline__ void decode(uint32_t word, const Group& group, const float*,
                                                float (&out)[8]) {
    unpack8(word, group.zero, out);
  }
  static __device__ __forceinline__ void decode_scaled(const Int4Weight& w, int64_t n, int64_t g,
                                                       uint32_t word, float (&out)[8]) {
    const GroupGrid grid = load_grid(w, n, g);
    unpack8(word, grid.zero, out);
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] *= grid.scale;
  }
};

}  // namespace llmkern::cuda
