// w4a16_gemm: out[m, n] = sum_k x[m, k] * w[n, k] + bias[n], w = scales * (codes - zeros) in 4
// bits.
//
// Weights in the CUDA layout and 16-bit x: see w4a16_tensor_core.cuh. Weights in the canonical
// layout, which a caller of the op may pass as they come from a file, and float32 x over these take
// one of two plain kernels. Up to M = 8 reading the weights (0.5 byte each) is the bound: a warp
// owns two output columns, each lane takes 32 codes of a row (16 bytes, never more than one group)
// at a time, sums x * (code - zero) exactly as integers allow, scales once per 32 codes, and the
// lanes are added by shuffles in a fixed order. Above, arithmetic is: a CTA owns a 64 x 64 tile of
// out and dequantizes each weight once per tile into shared memory, in float32. Both accumulate in
// float32, and neither splits K between CTAs, so results are the same on every run. Layout:
// llmkern/formats/int4.py.
//
// Not yet run on a GPU: tested in the emulator (csrc/emu) and compiled ahead of time only; the tile
// sizes and the switch at M = 8 are not tuned.

#include "cuda/common/dtype.cuh"
#include "cuda/common/int4.cuh"
#include "cuda/common/launch.h"
#include "cuda/common/tile.cuh"
#include "cuda/kernels.h"
#include "cuda/w4a16_tensor_core.cuh"

namespace llmkern::cuda {
namespace {

constexpr int kGemvMaxRows = 8;
constexpr int kGemvWarps = 4;
constexpr int kGemvColumns = 2;  // per warp: x is loaded once for both
constexpr int kChunk = 32;       // codes in a lane's 16 bytes

template <typename T, int ROWS>
__global__ void __launch_bounds__(kGemvWarps * 32) w4a16_gemv_kernel(const W4A16GemmParams p) {
  const Int4Weight& w = p.w;
  const int lane = threadIdx.x % 32;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kGemvWarps + threadIdx.x / 32;
  const int64_t first = warp * kGemvColumns;
  if (first >= w.N) return;
  const T* x = static_cast<const T*>(p.x);
  const bool vector = vectorizable(x, p.x_stride);

  // Rows and columns past the end read the last one and are not stored.
  int64_t column[kGemvColumns];
#pragma unroll
  for (int c = 0; c < kGemvColumns; c++) column[c] = first + c < w.N ? first + c : w.N - 1;
  const T* x_row[ROWS];
#pragma unroll
  for (int m = 0; m < ROWS; m++) x_row[m] = x + (m < p.M ? m : p.M - 1) * p.x_stride;

  float acc[kGemvColumns][ROWS] = {};
  for (int64_t k = lane * kChunk; k < w.K; k += 32 * kChunk) {
    Bytes16 codes[kGemvColumns];
    GroupGrid grid[kGemvColumns];
#pragma unroll
    for (int c = 0; c < kGemvColumns; c++) {
      const auto* row = static_cast<const uint32_t*>(w.qweight) + column[c] * (w.K / 8);
      codes[c] = *reinterpret_cast<const Bytes16*>(row + k / 8);
      grid[c] = load_grid(w, column[c], k / w.group_size);
    }
    float partial[kGemvColumns][ROWS] = {};
#pragma unroll 1  // unrolled, it takes more registers and 1.6 times as long to compile
    for (int word = 0; word < 4; word++) {
      float q[kGemvColumns][8];
#pragma unroll
      for (int c = 0; c < kGemvColumns; c++) {
        unpack8(codes[c].word[0], grid[c].zero, q[c]);
#pragma unroll
        for (int i = 0; i < 3; i++) codes[c].word[i] = codes[c].word[i + 1];
      }
#pragma unroll
      for (int m = 0; m < ROWS; m++) {
        float v[8];
        load8(x_row[m] + k + 8 * word, vector, v);
#pragma unroll
        for (int c = 0; c < kGemvColumns; c++)
#pragma unroll
          for (int i = 0; i < 8; i++) partial[c][m] += v[i] * q[c][i];
      }
    }
#pragma unroll
    for (int c = 0; c < kGemvColumns; c++)
#pragma unroll
      for (int m = 0; m < ROWS; m++) acc[c][m] += grid[c].scale * partial[c][m];
  }

#pragma unroll
  for (int c = 0; c < kGemvColumns; c++) {
#pragma unroll
    for (int m = 0; m < ROWS; m++) {
      float sum = acc[c][m];
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      if (lane != c * ROWS + m || m >= p.M || first + c >= w.N) continue;
      if (p.bias) sum += to_float(static_cast<const T*>(p.bias)[first + c]);
      store(static_cast<T*>(p.out) + m * w.N + first + c, sum);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    w4a16_gemm_kernel(const W4A16GemmParams p, const unsigned m_tiles) {
  LLMKERN_SHARED(float, smem_x, [BLOCK_K][BLOCK + 1]);
  LLMKERN_SHARED(float, smem_w, [BLOCK_K][BLOCK + 1]);
  const Int4Weight& w = p.w;
  const int tid = threadIdx.x;
  // Neighbouring CTAs share columns of w.
  const int64_t first_m = static_cast<int64_t>(blockIdx.x % m_tiles) * BLOCK;
  const int64_t first_n = static_cast<int64_t>(blockIdx.x / m_tiles) * BLOCK;
  const bool vector = vectorizable(static_cast<const T*>(p.x), p.x_stride);

  // Loading, a thread brings eight k of one row of each operand.
  const int load_row = tid / 4, load_k = tid % 4 * 8;
  const int64_t m = first_m + load_row, n = first_n + load_row;
  const T* x_row = static_cast<const T*>(p.x) + (m < p.M ? m : 0) * p.x_stride;
  const auto* w_row = static_cast<const uint32_t*>(w.qweight) + (n < w.N ? n : 0) * (w.K / 8);

  float acc[kMicro][kMicro] = {};
  for (int64_t k0 = 0; k0 < w.K; k0 += BLOCK_K) {
    const int64_t k = k0 + load_k;
    float v[8] = {}, q[8] = {};
    if (m < p.M) load8(x_row + k, vector, v);
    if (n < w.N) {
      const GroupGrid grid = load_grid(w, n, k / w.group_size);
      unpack8(w_row[k / 8], grid.zero, q);
#pragma unroll
      for (int i = 0; i < 8; i++) q[i] *= grid.scale;
    }
    __syncthreads();  // the previous tile has been used
#pragma unroll
    for (int i = 0; i < 8; i++) {
      smem_x[load_k + i][load_row] = v[i];
      smem_w[load_k + i][load_row] = q[i];
    }
    __syncthreads();
    accumulate_tile(smem_x, smem_w, tid, acc);
  }

#pragma unroll
  for (int j = 0; j < kMicro; j++) {
    const int64_t out_n = first_n + tile_column(tid, j);
    if (out_n >= w.N) continue;
    const float bias = p.bias ? to_float(static_cast<const T*>(p.bias)[out_n]) : 0.0f;
#pragma unroll
    for (int i = 0; i < kMicro; i++) {
      const int64_t out_m = first_m + tile_row(tid, i);
      if (out_m < p.M) store(static_cast<T*>(p.out) + out_m * w.N + out_n, acc[i][j] + bias);
    }
  }
}

template <typename T, int ROWS>
void launch_gemv(const W4A16GemmParams& p, void* stream) {
  launch("w4a16_gemm", w4a16_gemv_kernel<T, ROWS>, ceil_div(p.w.N, kGemvWarps * kGemvColumns),
         kGemvWarps * 32, stream, p);
}

}  // namespace

void w4a16_gemm(const W4A16GemmParams& p, const ChunkConfig& config, void* stream) {
  dispatch(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (!std::is_same_v<T, float>) {
      if (p.w.layout == Int4Layout::kCuda) return w4a16_tensor_core<T>(p, config, stream);
    }
    if (p.M == 1) return launch_gemv<T, 1>(p, stream);
    if (p.M == 2) return launch_gemv<T, 2>(p, stream);
    if (p.M <= 4) return launch_gemv<T, 4>(p, stream);
    if (p.M <= kGemvMaxRows) return launch_gemv<T, kGemvMaxRows>(p, stream);
    const int64_t m_tiles = ceil_div(p.M, BLOCK);
    launch("w4a16_gemm", w4a16_gemm_kernel<T>, m_tiles * ceil_div(p.w.N, BLOCK), kTileThreads,
           stream, p, static_cast<unsigned>(m_tiles));
  });
}

}  // namespace llmkern::cuda
