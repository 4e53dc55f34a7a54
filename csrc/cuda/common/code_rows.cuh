// Products with 4-bit codes in the canonical layout, and with float32 x, which tensor cores do not
// multiply exactly: what w4a16_gemm and lut4_gemm share. Nothing but the result is rounded.
//
// Up to M = 8 reading the weights (0.5 byte each) is the bound: a warp owns two output columns,
// each lane takes 32 codes of a row (16 bytes, never more than one group) at a time, sums x * value
// in float32, scales once per 32 codes, and the lanes are added by shuffles in a fixed order.
// Above, arithmetic is: a CTA owns a 64 x 64 tile of out and decodes each weight once per tile into
// shared memory, in float32. Neither splits K between CTAs, so results are the same on every run.
//
// A Weight is a struct with N, K, group_size and qweight, and CodeRows<Weight> has
//
//   static constexpr int kBookEntries;    floats of shared memory per lane and row, 1 for none
//   struct Group;                         what decoding takes, with a member scale
//   void enter_row(w, book, n)            once per row: `book` is the lane's own, entries 32 apart
//   Group enter_group(w, book, n, g)
//   void decode(word, group, book, q)     the eight values of a word, unscaled
//   void decode_scaled(w, n, g, word, q)  the same times their scale, without a book of its own
#pragma once

#include <type_traits>

#include "cuda/common/dtype.cuh"
#include "cuda/common/launch.h"
#include "cuda/common/tile.cuh"

namespace llmkern::cuda {

constexpr int kGemvMaxRows = 8;
constexpr int kGemvWarps = 4;
constexpr int kGemvColumns = 2;  // per warp: x is loaded once for both
constexpr int kPiece = 32;       // codes in a lane's 16 bytes

template <typename Weight>
struct CodeRows;

template <typename T, int ROWS, typename Params>
__global__ void __launch_bounds__(kGemvWarps * 32, 3) code_gemv_kernel(const Params p) {
  using Weight = std::decay_t<decltype(p.w)>;
  using Rows = CodeRows<Weight>;
  LLMKERN_SHARED(float, smem_books, [kGemvWarps][kGemvColumns][Rows::kBookEntries][32]);
  const Weight& w = p.w;
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
    Rows::enter_row(w, book[c], column[c]);
  }
  const T* x_row[ROWS];
#pragma unroll
  for (int m = 0; m < ROWS; m++) x_row[m] = x + (m < p.M ? m : p.M - 1) * p.x_stride;

  float acc[kGemvColumns][ROWS] = {};
  for (int64_t k = lane * kPiece; k < w.K; k += 32 * kPiece) {
    const int64_t g = k / w.group_size;
    Bytes16 codes[kGemvColumns];
    typename Rows::Group group[kGemvColumns];
#pragma unroll
    for (int c = 0; c < kGemvColumns; c++) {
      codes[c] = *reinterpret_cast<const Bytes16*>(static_cast<const uint32_t*>(w.qweight) +
                                                   column[c] * (w.K / 8) + k / 8);
      group[c] = Rows::enter_group(w, book[c], column[c], g);
    }
    float partial[kGemvColumns][ROWS] = {};
#pragma unroll 1  // unrolled, it takes more registers and longer to compile
    for (int word = 0; word < 4; word++) {
      float q[kGemvColumns][8];
#pragma unroll
      for (int c = 0; c < kGemvColumns; c++) {
        Rows::decode(codes[c].word[0], group[c], book[c], q[c]);
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
      for (int m = 0; m < ROWS; m++) acc[c][m] += group[c].scale * partial[c][m];
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

template <typename T, typename Params>
__global__ void __launch_bounds__(kTileThreads)
    code_gemm_kernel(const Params p, const unsigned m_tiles) {
  LLMKERN_SHARED(float, smem_x, [BLOCK_K][BLOCK + 1]);
  LLMKERN_SHARED(float, smem_w, [BLOCK_K][BLOCK + 1]);
  using Weight = std::decay_t<decltype(p.w)>;
  const Weight& w = p.w;
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
    if (n < w.N) CodeRows<Weight>::decode_scaled(w, n, k / w.group_size, w_row[k / 8], q);
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

template <typename T, int ROWS, typename Params>
void launch_code_gemv(const char* op, const Params& p, void* stream) {
  launch(op, code_gemv_kernel<T, ROWS, Params>, ceil_div(p.w.N, kGemvWarps * kGemvColumns),
         kGemvWarps * 32, stream, p);
}

template <typename T, typename Params>
void code_gemm(const char* op, const Params& p, void* stream) {
  if (p.M == 1) return launch_code_gemv<T, 1>(op, p, stream);
  if (p.M == 2) return launch_code_gemv<T, 2>(op, p, stream);
  if (p.M <= 4) return launch_code_gemv<T, 4>(op, p, stream);
  if (p.M <= kGemvMaxRows) return launch_code_gemv<T, kGemvMaxRows>(op, p, stream);
  const int64_t m_tiles = ceil_div(p.M, BLOCK);
  launch(op, code_gemm_kernel<T, Params>, m_tiles * ceil_div(p.w.N, BLOCK), kTileThreads, stream, p,
         static_cast<unsigned>(m_tiles));
}

}  // namespace llmkern::cuda
