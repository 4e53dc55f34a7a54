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

#include "cuda/common/dtype.cuh"
#include "cuda/common/launch.h"
#include "cuda/kernels.h"

namespace llmkern::cuda {
namespace {

constexpr int kRows = 64;    // of w per CTA, one per thread
constexpr int kBlock = 128;  // columns; BLOCK_SIZE of _obs_blocks.py
constexpr int kPanel = 16;
constexpr int kClipSteps = 20;  // CLIP_STEPS and CLIP_MIN of llmkern/reference/obs_quantize.py
constexpr double kClipMin = 0.6;

// Fractions of the range that the clipping search tries; on the host because they are doubles
// there.
struct ClipFractions {
  int count;
  float value[kClipSteps];
};

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

// Min-max grid of columns first..last-1 of this thread's row, clipped if that lowers the error.
__device__ __forceinline__ Grid fit_grid(const Columns& columns, int row, int first, int last,
                                         const ObsQuantizeParams& p, const ClipFractions& clip) {
  const float top = static_cast<float>((1 << p.bits) - 1);
  float low = 0.0f, high = 0.0f;
  for (int c = first; c < last; c++) {
    low = fminf(low, columns[c][row]);
    high = fmaxf(high, columns[c][row]);
  }
  if (p.symmetric) {
    high = fmaxf(-low, high);
    low = -high;
  }
  Grid best = {1.0f, 0.0f};
  float best_error = 0.0f;
  for (int step = 0; step < clip.count; step++) {
    const float fraction = clip.value[step];
    Grid grid;
    grid.scale = round_to(__fdiv_rn(__fmul_rn(high - low, fraction), top), p.scales_dtype);
    if (!(grid.scale > 0.0f)) grid.scale = 1.0f;
    grid.zero =
        p.symmetric
            ? static_cast<float>(1 << (p.bits - 1))
            : fminf(fmaxf(rintf(__fdiv_rn(__fmul_rn(-low, fraction), grid.scale)), 0.0f), top);
    float error = 0.0f;
    if (clip.count > 1) {
      for (int c = first; c < last; c++) {
        const float v = columns[c][row];
        const float e = dequantize(quantize(v, grid, top), grid) - v;
        error += e * e;
      }
    }
    if (step == 0 || error < best_error) {
      best = grid;
      best_error = error;
    }
  }
  return best;
}

// strip[j - j0][c] = U[j, c0 + c] for rows j0..j1-1 of the block and the panel's columns. Every
// thread of the CTA calls it; the caller has synchronized since the last use of the strip.
__device__ __forceinline__ void load_strip(Strip& strip, const ObsBlockParams& p, int j0, int j1,
                                           int c0, int c1) {
  for (int i = threadIdx.x; i < (j1 - j0) * kPanel; i += kRows) {
    const int j = j0 + i / kPanel, c = c0 + i % kPanel;
    if (c < c1) strip[i / kPanel][i % kPanel] = p.op.U[(p.first + j) * p.op.K + p.first + c];
  }
}

// v[i] += sum of this row's errors at columns j0..j1-1 times the strip's rows.
__device__ __forceinline__ void push_errors(const Columns& columns, const Strip& strip, int row,
                                            int j0, int j1, int width, float (&v)[kPanel]) {
  for (int j = j0; j < j1; j++) {
    const float e = columns[j][row];
#pragma unroll
    for (int i = 0; i < kPanel; i++)
      if (i < width) v[i] += e * strip[j - j0][i];
  }
}

__global__ void __launch_bounds__(kRows)
    obs_quantize_kernel(const __grid_constant__ ObsBlockParams p,
                        const __grid_constant__ ClipFractions clip) {
  LLMKERN_SHARED(float, columns, [kBlock][kRows + 1]);
  LLMKERN_SHARED(float, strip, [kBlock][kPanel]);
  const ObsQuantizeParams& op = p.op;
  const int row = threadIdx.x;
  const int width = static_cast<int>(p.last - p.first);
  const int64_t first_n = static_cast<int64_t>(blockIdx.x) * kRows;
  const int64_t n = first_n + row;
  const bool live = n < op.N;
  const int64_t groups = op.K / op.group_size;
  const float top = static_cast<float>((1 << op.bits) - 1);

  for (int r = row / 32; r < kRows; r += kRows / 32)
    for (int c = row % 32; c < width; c += 32)
      columns[c][r] = first_n + r < op.N ? op.w_hat[(first_n + r) * op.K + p.first + c] : 0.0f;
  __syncthreads();

  Grid grid = {1.0f, 0.0f};
  float loss = 0.0f;
  int pushed = 0;  // errors of columns before it are already in the columns of the current group
  int group_end = width;
  for (int k = 0; k < width;) {
    if (p.fit && (p.first + k) % op.group_size == 0) {
      // The grid needs all of the group's columns with every error made so far.
      group_end = k + static_cast<int>(op.group_size);
      for (int c = k; c < group_end; c += kPanel) {
        const int c_end = min(c + kPanel, group_end);
        __syncthreads();
        load_strip(strip, p, 0, k, c, c_end);
        __syncthreads();
        float v[kPanel] = {};
        push_errors(columns, strip, row, 0, k, c_end - c, v);
#pragma unroll
        for (int i = 0; i < kPanel; i++)
          if (c + i < c_end) columns[c + i][row] += v[i];
      }
      pushed = k;
      grid = fit_grid(columns, row, k, group_end, op, clip);
      if (live) {
        const int64_t g = n * groups + (p.first + k) / op.group_size;
        op.scales[g] = grid.scale;
        op.zeros[g] = grid.zero;
      }
    }
    const int k_end = min(k + kPanel, group_end);
    __syncthreads();
    load_strip(strip, p, pushed, k_end, k, k_end);
    __syncthreads();
    float v[kPanel];
#pragma unroll
    for (int i = 0; i < kPanel; i++) v[i] = k + i < k_end ? columns[k + i][row] : 0.0f;
    push_errors(columns, strip, row, pushed, k, k_end - k, v);
#pragma unroll
    for (int i = 0; i < kPanel; i++) {
      if (k + i >= k_end) break;
      const int64_t column = p.first + k + i;
      const int64_t at = n * op.K + column;
      if (!p.fit && live) {
        const int64_t g = n * groups + op.g_idx[column];
        grid = {op.scales[g], op.zeros[g]};
      }
      const float code = quantize(v[i], grid, top);
      const float w_hat = dequantize(code, grid);
      const float e = live ? op.w[at] - w_hat : 0.0f;
      const float scaled = (v[i] - w_hat) * op.d[column];
      loss += scaled * scaled;
      columns[k + i][row] = e;
#pragma unroll
      for (int later = i + 1; later < kPanel; later++)
        if (k + later < k_end) v[later] += e * strip[k - pushed + i][later];
      if (live) {
        op.codes[at] = static_cast<uint8_t>(code);
        op.w_hat[at] = w_hat;
      }
    }
    k = k_end;
  }
  if (live) op.loss[n] += loss;

  __syncthreads();
  for (int r = row / 32; r < kRows; r += kRows / 32)
    for (int c = row % 32; c < width; c += 32)
      if (first_n + r < op.N) p.error[(first_n + r) * p.error_stride + c] = columns[c][r];
}

}  // namespace

void obs_quantize_block(const ObsBlockParams& p, void* stream) {
  ClipFractions clip = {p.op.clip_search ? kClipSteps : 1, {}};
  for (int step = 0; step < kClipSteps; step++)
    clip.value[step] = static_cast<float>(1.0 - (1.0 - kClipMin) * step / (kClipSteps - 1));
  launch("obs_quantize", obs_quantize_kernel, ceil_div(p.op.N, kRows), kRows, stream, p, clip);
}

}  // namespace llmkern::cuda
