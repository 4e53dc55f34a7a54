// hessian_update for 16-bit x on tensor cores: lower triangle of H += alpha * xᵀx, float32 sums.
//
// Bound by arithmetic: K * (K + 1) / 2 * T multiply-adds. A CTA owns a TILE x TILE tile of H on or
// below the diagonal and walks over the rows of x, kSyrkRows at a time, through a ring of stages
// that cp.async fills. x lies in shared memory as in global memory, rows of t: both operands of
// mma.sync m16n8k16 want the other order, which ldmatrix.trans gives.
//
// The tensor core cuts its sums off instead of rounding them, which adds up where all products have
// one sign, as on the diagonal. So it sums kFlushRows rows, added to a second accumulator, which in
// turn is emptied into H every kPromoteRows rows: no sum is long, and every one has a fixed order
// that neither the tile nor the other experts change. alpha multiplies sums, never x, whose
// products are exact.
//
// Not yet run on a GPU: tested in the emulator (csrc/emu) and compiled ahead of time only; tiles
// and the ring's depth are not tuned.
#pragma once

#include "cuda/common/launch.h"
#include "cuda/common/lower_tile.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/kernels.h"

namespace llmkern::cuda {

constexpr int kSyrkRows = 32;  // of x per stage: two k-steps
constexpr int kSyrkStages = 4;
constexpr int kFlushRows = 128;
constexpr int kPromoteRows = 4096;
constexpr int kFullGpu = 132;  // CTAs that fill it: an H100's multiprocessors

template <int TILE>
struct Syrk {
  static constexpr int kWarpsJ = TILE / 32;
  static constexpr int kThreads = 2 * kWarpsJ * 32;
  static constexpr int kRowsI = TILE / 2;   // of H per warp; 32 columns
  static constexpr int kStride = TILE + 8;  // elements; odd in 16 bytes: no bank conflicts
  static constexpr int kOperand = kSyrkRows * kStride;
  static constexpr size_t kBytes = kSyrkStages * 2 * kOperand * sizeof(uint16_t);
};

// acc += the products of one stage, for a warp's strip. left and right are the stage's operands.
template <typename T, int TILE>
__device__ __forceinline__ void multiply_rows(const uint16_t* left, const uint16_t* right,
                                              float (&acc)[TILE / 32][4][4]) {
  using Shape = Syrk<TILE>;
  constexpr int kStrips = Shape::kRowsI / 16;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // ldmatrix.trans: lanes 8 i .. 8 i + 7 point at the t-rows of matrix i. Operand a wants (i, t)
  // quadrants column by column, operand b those of two neighbouring n-tiles t first.
  left += (lane / 16 * 8 + lane % 8) * Shape::kStride + warp / Shape::kWarpsJ * Shape::kRowsI +
          lane / 8 % 2 * 8;
  right +=
      (lane / 8 % 2 * 8 + lane % 8) * Shape::kStride + warp % Shape::kWarpsJ * 32 + lane / 16 * 8;
#pragma unroll
  for (int t = 0; t < kSyrkRows; t += 16) {
    uint32_t a[kStrips][4];
#pragma unroll
    for (int i = 0; i < kStrips; i++)
      ptx::ldmatrix_x4_trans(a[i], left + t * Shape::kStride + i * 16);
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, right + t * Shape::kStride + j * 8);
      const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
      for (int i = 0; i < kStrips; i++) {
        ptx::mma_m16n8k16<T>(acc[i][j], a[i], first);
        ptx::mma_m16n8k16<T>(acc[i][j + 1], a[i], second);
      }
    }
  }
}

// H += alpha * sum in this warp's strip, on and below the diagonal.
template <int TILE>
__device__ __forceinline__ void add_to_hessian(float* H, int64_t K, int64_t first_i,
                                               int64_t first_j, float alpha,
                                               const float (&sum)[TILE / 32][4][4]) {
  using Shape = Syrk<TILE>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  first_i += warp / Shape::kWarpsJ * Shape::kRowsI + lane / 4;
  first_j += warp % Shape::kWarpsJ * 32 + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < Shape::kRowsI / 16; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int64_t row = first_i + i * 16 + e / 2 * 8, column = first_j + j * 8 + e % 2;
        if (row < K && column <= row) H[row * K + column] += alpha * sum[i][j][e];
      }
}

// VECTOR: x and its rows are in 16-byte pieces. Otherwise stages are filled element by element.
template <typename T, int TILE, bool VECTOR>
__global__ void __launch_bounds__(Syrk<TILE>::kThreads)
    hessian_tensor_core_kernel(const HessianUpdateParams p, const unsigned tiles) {
  using Shape = Syrk<TILE>;
  constexpr int kPieces = TILE / 8;  // of 16 bytes per row
  LLMKERN_DYNAMIC_SHARED(uint16_t, ring);
  const int tid = threadIdx.x;
  const int64_t expert = blockIdx.x / tiles;
  const Rows rows = rows_of(p, expert);
  const LowerTile tile = lower_tile(blockIdx.x % tiles);
  const int64_t first_i = int64_t{tile.row} * TILE, first_j = int64_t{tile.column} * TILE;
  const bool diagonal = tile.row == tile.column;
  const auto* x = static_cast<const uint16_t*>(p.x);
  float* H = p.H + expert * p.K * p.K;
  const int steps = static_cast<int>((rows.end - rows.begin + kSyrkRows - 1) / kSyrkRows);

  const auto copy_piece = [&](uint16_t* to, int64_t t, int64_t column) {
    const uint16_t* from = x + t * p.K + column;
    if constexpr (VECTOR) {
      const bool valid = t < rows.end && column < p.K;
      ptx::cp_async_16(to, valid ? from : x, valid);
    } else {
#pragma unroll
      for (int c = 0; c < 8; c++) to[c] = t < rows.end && column + c < p.K ? from[c] : uint16_t{0};
    }
  };
  const auto copy_rows = [&](int step) {
    uint16_t* stage = ring + step % kSyrkStages * 2 * Shape::kOperand;
    const int64_t t = rows.begin + int64_t{step} * kSyrkRows;
#pragma unroll
    for (int at = tid; at < kSyrkRows * kPieces; at += Shape::kThreads) {
      const int row = at / kPieces, column = at % kPieces * 8;
      uint16_t* to = stage + row * Shape::kStride + column;
      copy_piece(to, t + row, first_i + column);
      if (!diagonal) copy_piece(to + Shape::kOperand, t + row, first_j + column);
    }
  };

  for (int step = 0; step < kSyrkStages - 1; step++) {
    if (step < steps) copy_rows(step);
    ptx::cp_async_commit();
  }
  float acc[TILE / 32][4][4] = {}, sum[TILE / 32][4][4] = {};
  for (int step = 0; step < steps; step++) {
    ptx::cp_async_wait<kSyrkStages - 2>();
    __syncthreads();  // the stage is there for all, and all are done with the one before it
    if (step + kSyrkStages - 1 < steps) copy_rows(step + kSyrkStages - 1);
    ptx::cp_async_commit();
    const uint16_t* stage = ring + step % kSyrkStages * 2 * Shape::kOperand;
    multiply_rows<T, TILE>(stage, diagonal ? stage : stage + Shape::kOperand, acc);
    const int done = step + 1;
    if (done % (kFlushRows / kSyrkRows) != 0 && done != steps) continue;
#pragma unroll
    for (int i = 0; i < TILE / 32; i++)
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          sum[i][j][e] += acc[i][j][e];
          acc[i][j][e] = 0.0f;
        }
    if (done % (kPromoteRows / kSyrkRows) != 0 && done != steps) continue;
    add_to_hessian<TILE>(H, p.K, first_i, first_j, static_cast<float>(p.alpha), sum);
#pragma unroll
    for (int i = 0; i < TILE / 32; i++)
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) sum[i][j][e] = 0.0f;
  }
}

template <typename T, int TILE, bool VECTOR>
void launch_hessian(const HessianUpdateParams& p, void* stream) {
  const int64_t tiles = lower_tiles(ceil_div(p.K, TILE));
  LaunchOptions options;
  options.dynamic_shared_bytes = Syrk<TILE>::kBytes;
  launch_with(options, "hessian_update", hessian_tensor_core_kernel<T, TILE, VECTOR>, p.E * tiles,
              Syrk<TILE>::kThreads, stream, p, static_cast<unsigned>(tiles));
}

// The large tile reads x half as often; the small one is for matrices with too few large ones.
template <typename T>
void hessian_tensor_core(const HessianUpdateParams& p, void* stream) {
  if (!vectorizable(static_cast<const T*>(p.x), p.K))
    return launch_hessian<T, 64, false>(p, stream);
  if (p.E * lower_tiles(ceil_div(p.K, 128)) < kFullGpu)
    return launch_hessian<T, 64, true>(p, stream);
  launch_hessian<T, 128, true>(p, stream);
}

}  // namespace llmkern::cuda
