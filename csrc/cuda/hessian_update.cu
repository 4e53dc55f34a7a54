// hessian_update: lower triangle of H[e, i, j] += alpha * sum_t x[t, i] * x[t, j] over the rows t
// of expert e.
//
// 16-bit x goes to tensor cores (hessian_tensor_core.cuh). float32 x is multiplied in float32,
// never through TF32: a CTA owns one 64 x 64 tile of H on or below the diagonal and walks over all
// rows of x, so the sum has one fixed order. Sums of kFloatFlushRows rows are added to a second
// accumulator, because one float32 sum over a whole calibration set would lose the late rows. alpha
// multiplies the finished sum.
//
// Not yet run on a GPU: tested in the emulator (csrc/emu) and compiled ahead of time only.

#include "cuda/common/dtype.cuh"
#include "cuda/common/launch.h"
#include "cuda/common/lower_tile.cuh"
#include "cuda/common/tile.cuh"
#include "cuda/hessian_tensor_core.cuh"
#include "cuda/kernels.h"

namespace llmkern::cuda {
namespace {

constexpr int kFloatFlushRows = 512;  // about the square root of a calibration set's rows

__global__ void __launch_bounds__(kTileThreads)
    hessian_float32_kernel(const HessianUpdateParams p, const unsigned tiles) {
  LLMKERN_SHARED(float, smem_i, [BLOCK_K][BLOCK + 1]);
  LLMKERN_SHARED(float, smem_j, [BLOCK_K][BLOCK + 1]);
  const int64_t expert = blockIdx.x / tiles;
  const Rows rows = rows_of(p, expert);
  const LowerTile tile = lower_tile(blockIdx.x % tiles);
  const int64_t first_i = int64_t{tile.row} * BLOCK, first_j = int64_t{tile.column} * BLOCK;
  const int tid = threadIdx.x;
  const int load_t = tid / 8, load_column = tid % 8 * 8;
  const auto* x = static_cast<const float*>(p.x);
  const bool vector = vectorizable(x, p.K);
  const int64_t i = first_i + load_column, j = first_j + load_column;

  float acc[kMicro][kMicro] = {}, total[kMicro][kMicro] = {};
  int64_t done = 0;
  for (int64_t t0 = rows.begin; t0 < rows.end; t0 += BLOCK_K) {
    const int64_t t = t0 + load_t;
    float v[8] = {}, u[8] = {};
    if (t < rows.end) {
      load8_masked(x + t * p.K + i, p.K - i, vector, v);
      load8_masked(x + t * p.K + j, p.K - j, vector, u);
    }
    __syncthreads();  // the previous tile has been used
#pragma unroll
    for (int c = 0; c < 8; c++) {
      smem_i[load_t][load_column + c] = v[c];
      smem_j[load_t][load_column + c] = u[c];
    }
    __syncthreads();
    accumulate_tile(smem_i, smem_j, tid, acc);
    done += BLOCK_K;
    if (done % kFloatFlushRows == 0 || t0 + BLOCK_K >= rows.end) {
#pragma unroll
      for (int a = 0; a < kMicro; a++)
#pragma unroll
        for (int b = 0; b < kMicro; b++) {
          total[a][b] += acc[a][b];
          acc[a][b] = 0.0f;
        }
    }
  }

  const float alpha = static_cast<float>(p.alpha);
  float* H = p.H + expert * p.K * p.K;
#pragma unroll
  for (int a = 0; a < kMicro; a++) {
    const int64_t row = first_i + tile_row(tid, a);
#pragma unroll
    for (int b = 0; b < kMicro; b++) {
      const int64_t column = first_j + tile_column(tid, b);
      if (row < p.K && column <= row) H[row * p.K + column] += alpha * total[a][b];
    }
  }
}

}  // namespace

void hessian_update(const HessianUpdateParams& p, void* stream) {
  if (p.dtype == DType::kBFloat16) return hessian_tensor_core<__nv_bfloat16>(p, stream);
  if (p.dtype == DType::kFloat16) return hessian_tensor_core<__half>(p, stream);
  const int64_t tiles = lower_tiles(ceil_div(p.K, BLOCK));
  launch("hessian_update", hessian_float32_kernel, p.E * tiles, kTileThreads, stream, p,
         static_cast<unsigned>(tiles));
}

}  // namespace llmkern::cuda
