// The chunks that the CUDA layouts of weights are cut into: 64 rows (N) by 128 columns (K), scales
// and zero points inside (pictures in llmkern/formats/int4_cuda.py).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace llmkern::cuda {

constexpr int kChunkRows = 64;
constexpr int kChunkColumns = 128;
constexpr int kCodeBytes = kChunkRows * kChunkColumns / 2;

// Columns per scale inside a chunk: longer groups are repeated.
inline __host__ __device__ int inline_group_size(int64_t group_size) {
  return group_size % 128 == 0 ? 128 : group_size % 64 == 0 ? 64 : 32;
}

// Where the scale and zero point of a row of the chunk stand among the 64 of its group.
__host__ __device__ __forceinline__ int grid_index(int row) {
  return row / 16 * 16 + row % 8 * 2 + row % 16 / 8;
}

}  // namespace llmkern::cuda
