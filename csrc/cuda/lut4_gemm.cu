// lut4_gemm: out[m, n] = sum_k x[m, k] * w[n, k] + bias[n], w = scales * codebook[codes].
//
// Up to M = 8 reading the weights is the bound: a warp owns two output columns, each lane takes 32
// codes of a row (16 bytes, never more than one group) at a time, sums x * book[code] in float32,
// scales once per 32 codes, and the lanes are added by shuffles in a fixed order. A lane keeps its
// own copy of the book in shared memory, all of it in one bank, so that 32 lanes look up 32
// different codes, of as many books if each group has one, in one access. Above, 16-bit x goes
// through tensor cores (lut4_tensor_core.cuh) and float32 x through 64 x 64 tiles of out with the
// weights looked up once per tile. No kernel splits K between CTAs: results are the same on every
// run. Layout: llmkern/formats/lut4.py.
//
// Not yet run on a GPU: tested in the emulator (csrc/emu) and compiled ahead of time only; the tile
// sizes and the switch at M = 8 are not tuned.

#include "cuda/common/dtype.cuh"
#include "cuda/common/launch.h"
#include "cuda/common/tile.cuh"
#include "cuda/kernels.h"
#include "cuda/lut4_tensor_core.cuh"

namespace llmkern::cuda {
namespace {

constexpr int kGemvMaxRows = 8;
constexpr int kGemvWarps = 4;
constexpr int kGemvColumns = 2;  // per warp: x is loaded once for both
constexpr int kPiece = 32;       // codes in a lane's 16 bytes

// A lane's copy of a book: entry i at to[32 * i].
__device__ __forceinline__ void copy_book(float* to, const float* book) {
#pragma unroll
  for (int i = 0; i < 16; i++) to[32 * i] = book[i];
}

template <typename T, int ROWS>
__global__ void __launch_bounds__(kGemvWarps * 32, 3) lut4_gemv_kernel(const Lut4GemmParams p) {
  LLMKERN_SHARED(float, smem_books, [kGemvWarps][kGemvColumns][16][32]);
  const Lut4Weight& w = p.w;
  const int lane = threadIdx.x % 32;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kGemvWarps + threadIdx.x / 32;
  const int64_t first = warp * kGemvColumns;
  if (first >= w.N) return;
  const T* x = static_cast<const T*>(p.x);
  const bool vector = vectorizable(x, p.x_stride);

  // Rows and columns past the end read the last one and are not stored.
  int64_t column[kGemvColumns];
  float* book[kGemvColumns];
#pragma unroll
  for (int c = 0; c < kGemvColumns; c++) {
    column[c] = first + c < w.N ? first + c : w.N - 1;
    book[c] = &smem_books[threadIdx.x / 32][c][0][lane];
    if (!w.book_group_stride) copy_book(book[c], w.codebook + column[c] * w.book_row_stride);
  }
  const T* x_row[ROWS];
#pragma unroll
  for (int m = 0; m < ROWS; m++) x_row[m] = x + (m < p.M ? m : p.M - 1) * p.x_stride;

  float acc[kGemvColumns][ROWS] = {};
  for (int64_t k = lane * kPiece; k < w.K; k += 32 * kPiece) {
    const int64_t g = k / w.group_size;
    Bytes16 codes[kGemvColumns];
    float scale[kGemvColumns];
#pragma unroll
    for (int c = 0; c < kGemvColumns; c++) {
      codes[c] = *reinterpret_cast<const Bytes16*>(static_cast<const uint32_t*>(w.qweight) +
                                                   column[c] * (w.K / 8) + k / 8);
      scale[c] = load_scale(w, column[c], g);
      if (w.book_group_stride)
        copy_book(book[c], w.codebook + column[c] * w.book_row_stride + g * w.book_group_stride);
    }
    float partial[kGemvColumns][ROWS] = {};
#pragma unroll 1  // unrolled, it takes more registers and longer to compile
    for (int word = 0; word < 4; word++) {
      float q[kGemvColumns][8];
#pragma unroll
      for (int c = 0; c < kGemvColumns; c++) {
#pragma unroll
        for (int i = 0; i < 8; i++) q[c][i] = book[c][(codes[c].word[0] >> (4 * i) & 15) * 32];
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
      for (int m = 0; m < ROWS; m++) acc[c][m] += scale[c] * partial[c][m];
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

__global__ void __launch_bounds__(kTileThreads)
    lut4_gemm_kernel(const Lut4GemmParams p, const unsigned m_tiles) {
  LLMKERN_SHARED(float, smem_x, [BLOCK_K][BLOCK + 1]);
  LLMKERN_SHARED(float, smem_w, [BLOCK_K][BLOCK + 1]);
  const Lut4Weight& w = p.w;
  const int tid = threadIdx.x;
  // Neighbouring CTAs share columns of w.
  const int64_t first_m = static_cast<int64_t>(blockIdx.x % m_tiles) * BLOCK;
  const int64_t first_n = static_cast<int64_t>(blockIdx.x / m_tiles) * BLOCK;
  const auto* x = static_cast<const float*>(p.x);
  const bool vector = vectorizable(x, p.x_stride);

  // Loading, a thread brings eight k of one row of each operand.
  const int load_row = tid / 4, load_k = tid % 4 * 8;
  const int64_t m = first_m + load_row, n = first_n + load_row;
  const float* x_row = x + (m < p.M ? m : 0) * p.x_stride;
  const auto* w_row = static_cast<const uint32_t*>(w.qweight) + (n < w.N ? n : 0) * (w.K / 8);

  float acc[kMicro][kMicro] = {};
  for (int64_t k0 = 0; k0 < w.K; k0 += BLOCK_K) {
    const int64_t k = k0 + load_k;
    float v[8] = {}, q[8] = {};
    if (m < p.M) load8(x_row + k, vector, v);
    if (n < w.N) {
      const int64_t g = k / w.group_size;
      const float scale = load_scale(w, n, g);
      const float* book = w.codebook + n * w.book_row_stride + g * w.book_group_stride;
      const uint32_t word = w_row[k / 8];
#pragma unroll
      for (int i = 0; i < 8; i++) q[i] = scale * book[word >> (4 * i) & 15];
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
    const float bias = p.bias ? static_cast<const float*>(p.bias)[out_n] : 0.0f;
#pragma unroll
    for (int i = 0; i < kMicro; i++) {
      const int64_t out_m = first_m + tile_row(tid, i);
      if (out_m < p.M) static_cast<float*>(p.out)[out_m * w.N + out_n] = acc[i][j] + bias;
    }
  }
}

template <typename T, int ROWS>
void launch_gemv(const Lut4GemmParams& p, void* stream) {
  launch("lut4_gemm", lut4_gemv_kernel<T, ROWS>, ceil_div(p.w.N, kGemvWarps * kGemvColumns),
         kGemvWarps * 32, stream, p);
}

}  // namespace

void lut4_gemm(const Lut4GemmParams& p, void* stream) {
  dispatch(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.M == 1) return launch_gemv<T, 1>(p, stream);
    if (p.M == 2) return launch_gemv<T, 2>(p, stream);
    if (p.M <= 4) return launch_gemv<T, 4>(p, stream);
    if (p.M <= kGemvMaxRows) return launch_gemv<T, kGemvMaxRows>(p, stream);
    if constexpr (std::is_same_v<T, float>) {
      const int64_t m_tiles = ceil_div(p.M, BLOCK);
      launch("lut4_gemm", lut4_gemm_kernel, m_tiles * ceil_div(p.w.N, BLOCK), kTileThreads, stream,
             p, static_cast<unsigned>(m_tiles));
    } else {
      lut4_tensor_core<T>(p, stream);
    }
  });
}

}  // namespace llmkern::cuda
