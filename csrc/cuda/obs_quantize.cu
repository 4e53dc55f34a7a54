// obs_quantize, one block of up to 128 columns: for each column k in order
//   v = w_k + sum_{j<k} (w_j - q_j) U_jk,  q_k = Q(v),  loss += ((v - q_k) d_k)^2
// The sum over earlier blocks is already in w_hat (llmkern/ops/_obs_blocks.py). Rows are
// independent.
//
// Bound by latency: 128 dependent columns per block. A CTA owns 64 rows, a thread one row. The
// rows' columns lie in shared memory, as updated weights until they are quantized and as errors
// after; 16 columns (a panel) at a time are brought up to date in registers from all earlier errors
// and then quantized one after another, pushing each error onto the rest of the panel. U is read
// through shared memory, one panel's columns at a time. Divisions are IEEE and ties round to even,
// so that codes equal the reference's up to the order of sums.
//
// Not yet run on a GPU: tested in the emulator (csrc/emu) and compiled ahead of time only.

#include "cuda/common/launch.h"
#include "cuda/kernels.h"

namespace llmkern::cuda {
namespace {

constexpr int kRows = 64;    // of w per CTA, one per thread
constexpr int kBlock = 128;  // columns; BLOCK_SIZE of _obs_blocks.py
constexpr int kPanel = 16;

// Rows end on an odd length: loading (lanes along columns) and computing (lanes along rows) are
// both free of bank conflicts.
using Columns = float[kBlock][kRows + 1];
using Strip = float[kBlock][kPanel];

struct Grid {
  float scale, zero;
};

__device__ __forceinline__ float quantize(float v, Grid grid, float top) {
  const float code = rintf(__fdiv_rn(v, grid.scale)) + grid.zero;
  return fminf(fmaxf(code, 0.0f), top);
}

// Not contracted with a later subtraction: this is the value that gets stored.
__device__ __forceinline__ float dequantize(float code, Grid grid) {
  return __fmul_rn(grid.scale, code - grid.zero);
}

// strip[j][i] = U[j, k + i] for rows 0..k_end-1 of the block and columns k..k_end-1, the panel's.
// Every thread of the CTA calls it; the caller has synchronized since the last use of the strip.
__device__ __forceinline__ void load_strip(Strip& strip, const ObsBlockParams& p, int k,
                                           int k_end) {
  for (int at = threadIdx.x; at < k_end * kPanel; at += kRows) {
    const int j = at / kPanel, i = at % kPanel;
    if (k + i < k_end) strip[j][i] = p.U[(p.first + j) * p.K + p.first + k + i];
  }
}

// v[i] += sum of this row's errors at columns 0..k-1 times the strip's rows.
__device__ __forceinline__ void push_errors(const Columns& columns, const Strip& strip, int row,
                                            int k, int width, float (&v)[kPanel]) {
  for (int j = 0; j < k; j++) {
    const float e = columns[j][row];
#pragma unroll
    for (int i = 0; i < kPanel; i++)
      if (i < width) v[i] += e * strip[j][i];
  }
}

__global__ void __launch_bounds__(kRows)
    obs_quantize_kernel(const __grid_constant__ ObsBlockParams p) {
  LLMKERN_SHARED(float, columns, [kBlock][kRows + 1]);
  LLMKERN_SHARED(float, strip, [kBlock][kPanel]);
  const int row = threadIdx.x;
  const int width = static_cast<int>(p.last - p.first);
  const int64_t first_n = static_cast<int64_t>(blockIdx.x) * kRows;
  const int64_t n = first_n + row;
  const bool live = n < p.N;
  const float top = static_cast<float>((1 << p.bits) - 1);

  for (int r = row / 32; r < kRows; r += kRows / 32)
    for (int c = row % 32; c < width; c += 32)
      columns[c][r] = first_n + r < p.N ? p.w_hat[(first_n + r) * p.K + p.first + c] : 0.0f;
  __syncthreads();

  float loss = 0.0f;
  for (int k = 0; k < width; k += kPanel) {
    const int k_end = min(k + kPanel, width);
    __syncthreads();
    load_strip(strip, p, k, k_end);
    __syncthreads();
    float v[kPanel];
#pragma unroll
    for (int i = 0; i < kPanel; i++) v[i] = k + i < k_end ? columns[k + i][row] : 0.0f;
    push_errors(columns, strip, row, k, k_end - k, v);
#pragma unroll
    for (int i = 0; i < kPanel; i++) {
      if (k + i >= k_end) break;
      const int64_t column = p.first + k + i;
      const int64_t at = n * p.K + column;
      Grid grid = {1.0f, 0.0f};
      if (live) {
        const int64_t g = n * p.groups + p.g_idx[column];
        grid = {p.scales[g], p.zeros[g]};
      }
      const float code = quantize(v[i], grid, top);
      const float w_hat = dequantize(code, grid);
      const float e = live ? p.w[at] - w_hat : 0.0f;
      const float scaled = (v[i] - w_hat) * p.d[column];
      loss += scaled * scaled;
      columns[k + i][row] = e;
#pragma unroll
      for (int later = i + 1; later < kPanel; later++)
        if (k + later < k_end) v[later] += e * strip[k + i][later];
      if (live) {
        p.codes[at] = static_cast<uint8_t>(code);
        p.w_hat[at] = w_hat;
      }
    }
  }
  if (live) p.loss[n] += loss;

  __syncthreads();
  for (int r = row / 32; r < kRows; r += kRows / 32)
    for (int c = row % 32; c < width; c += 32)
      if (first_n + r < p.N) p.error[(first_n + r) * p.error_stride + c] = columns[c][r];
}

}  // namespace

void obs_quantize_block(const ObsBlockParams& p, void* stream) {
  launch("obs_quantize", obs_quantize_kernel, ceil_div(p.N, kRows), kRows, stream, p);
}

}  // namespace llmkern::cuda
