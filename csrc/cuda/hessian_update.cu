// hessian_update: lower triangle of H[i, j] += alpha * sum_t x[t, i] * x[t, j].
//
// Bound by arithmetic: K * K * T multiply-adds. A CTA owns one 64 x 64 tile of H on or below the
// diagonal (those above return at once) and walks over all rows of x, so the sum has one fixed
// order. Products of bfloat16 and float16 are exact in float32; sums of kFlushRows rows are added
// to a second accumulator, because one float32 sum over a whole calibration set would lose the late
// rows. alpha multiplies the finished sum.
//
// Not yet run on a GPU: tested in the emulator (csrc/emu) and compiled ahead of time only; a tensor
// core kernel for 16-bit x is still to come.

#include "cuda/common/dtype.cuh"
#include "cuda/common/launch.h"
#include "cuda/common/tile.cuh"
#include "cuda/kernels.h"

namespace llmkern::cuda {
namespace {

constexpr int kFlushRows = 512;  // about the square root of a calibration set's rows

template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    hessian_update_kernel(const HessianUpdateParams p, const unsigned tiles) {
  LLMKERN_SHARED(float, smem_i, [BLOCK_K][BLOCK + 1]);
  LLMKERN_SHARED(float, smem_j, [BLOCK_K][BLOCK + 1]);
  const int64_t first_i = static_cast<int64_t>(blockIdx.x / tiles) * BLOCK;
  const int64_t first_j = static_cast<int64_t>(blockIdx.x % tiles) * BLOCK;
  if (first_j > first_i) return;
  const int tid = threadIdx.x;
  const int load_t = tid / 8, load_column = tid % 8 * 8;
  const T* x = static_cast<const T*>(p.x);
  const bool vector = vectorizable(x, p.K);
  const int64_t i = first_i + load_column, j = first_j + load_column;

  float acc[kMicro][kMicro] = {}, total[kMicro][kMicro] = {};
  for (int64_t t0 = 0; t0 < p.T; t0 += BLOCK_K) {
    const int64_t t = t0 + load_t;
    float v[8] = {}, u[8] = {};
    if (t < p.T) {
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
    if ((t0 + BLOCK_K) % kFlushRows == 0 || t0 + BLOCK_K >= p.T) {
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
#pragma unroll
  for (int a = 0; a < kMicro; a++) {
    const int64_t row = first_i + tile_row(tid, a);
#pragma unroll
    for (int b = 0; b < kMicro; b++) {
      const int64_t column = first_j + tile_column(tid, b);
      if (row < p.K && column <= row) p.H[row * p.K + column] += alpha * total[a][b];
    }
  }
}

}  // namespace

void hessian_update(const HessianUpdateParams& p, void* stream) {
  const int64_t tiles = ceil_div(p.K, BLOCK);
  dispatch(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch("hessian_update", hessian_update_kernel<T>, tiles * tiles, kTileThreads, stream, p,
           static_cast<unsigned>(tiles));
  });
}

}  // namespace llmkern::cuda
