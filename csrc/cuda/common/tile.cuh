// A 64 x 64 output tile as a product over shared memory in plain float32 arithmetic: 256 threads,
// 4 x 4 outputs each.
#pragma once

#include <cuda_runtime.h>

namespace llmkern::cuda {

constexpr int BLOCK = 64;
constexpr int BLOCK_K = 32;
constexpr int kTileThreads = 256;
constexpr int kMicro = 4;
constexpr int kTileStep = BLOCK / kMicro;  // distance between a thread's outputs, on both axes

// One operand, [k][row]. The odd row length makes transposing stores (k = 8 * (tid % 4) + i, row =
// tid / 4) fall on distinct banks.
using Tile = float[BLOCK_K][BLOCK + 1];

__device__ __forceinline__ int tile_row(int tid, int i) { return tid / kTileStep + i * kTileStep; }
__device__ __forceinline__ int tile_column(int tid, int j) {
  return tid % kTileStep + j * kTileStep;
}

// acc[i][j] += sum_k a[k][tile_row(i)] * b[k][tile_column(j)], the sum over k finished first: over
// a long K that loses far less than one running sum, for 16 additions in 512 multiply-adds.
__device__ __forceinline__ void accumulate_tile(const Tile& a, const Tile& b, int tid,
                                                float (&acc)[kMicro][kMicro]) {
  float sum[kMicro][kMicro] = {};
#pragma unroll 8
  for (int k = 0; k < BLOCK_K; k++) {
    float row[kMicro], column[kMicro];
#pragma unroll
    for (int i = 0; i < kMicro; i++) {
      row[i] = a[k][tile_row(tid, i)];
      column[i] = b[k][tile_column(tid, i)];
    }
#pragma unroll
    for (int i = 0; i < kMicro; i++)
#pragma unroll
      for (int j = 0; j < kMicro; j++) sum[i][j] += row[i] * column[j];
  }
#pragma unroll
  for (int i = 0; i < kMicro; i++)
#pragma unroll
    for (int j = 0; j < kMicro; j++) acc[i][j] += sum[i][j];
}

}  // namespace llmkern::cuda
