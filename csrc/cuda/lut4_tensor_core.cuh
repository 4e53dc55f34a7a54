// lut4_gemm for many rows of 16-bit x: out^T = w x^T on mma.sync m16n8k16, weights as operand A.
//
// A CTA of four warps owns 64 columns of out and 8 NT of its rows; codes and x come through a ring
// of asynchronous copies, 64 of K at a time. A byte of codes is the pair of one register of operand
// A, so one book for all is a table of 256 pairs; a book per row or group is 16 entries per row.
//
// The order of K within 32 is free as long as both operands agree on it. Here lane l = 4 g + t of a
// warp takes the eight k from 8 t on, four in each of two products: its codes are then one word of
// a row of w, its part of x one 16-byte piece of a row of x, and nothing is shuffled.
//
// Rounding: the book's entries, once, to the type of x. A group's products are summed by the tensor
// core, then scaled in float32; so a row of out depends on neither the other rows nor NT.
#pragma once

#include <cstring>

#include "cuda/common/dtype.cuh"
#include "cuda/common/launch.h"
#include "cuda/common/ptx.cuh"
#include "cuda/kernels.h"

namespace llmkern::cuda {

constexpr int kLutThreads = 128;
constexpr int kLutRows = 64;     // of w per CTA, 16 per warp
constexpr int kLutColumns = 64;  // of K per stage
constexpr int kLutStages = 3;
constexpr int kCodeStride = 48;  // bytes: rows g of a warp fall on distinct banks
constexpr int kLutXStride = 96;  // elements: two rows' 64 bytes fill the 32 banks once
constexpr int kLutOutStride = kLutRows + 4;
constexpr int kLutCodeBytes = kLutRows * kCodeStride;
constexpr int kMaxBooks = kLutColumns / 32;  // per row of w and stage

template <bool ONE_BOOK>
constexpr int kBookBytes = ONE_BOOK ? 256 * 4 : kMaxBooks * kLutRows * 16 * 2;

template <int NT>
constexpr int kLutStageBytes = kLutCodeBytes + 8 * NT * kLutXStride * 2;

__device__ __forceinline__ float load_scale(const Lut4Weight& w, int64_t n, int64_t g) {
  return w.scales ? load_as(w.scales, n * (w.K / w.group_size) + g, w.scales_dtype) : 1.0f;
}

template <typename T>
__device__ __forceinline__ uint32_t to_bits(float v) {
  T rounded;
  store(&rounded, v);
  uint16_t bits;
  memcpy(&bits, &rounded, sizeof(bits));
  return bits;
}

// Two weights, from a byte of codes.
template <bool ONE_BOOK>
__device__ __forceinline__ uint32_t look_up(const void* book, uint32_t byte) {
  if constexpr (ONE_BOOK) return static_cast<const uint32_t*>(book)[byte];
  const auto* entry = static_cast<const uint16_t*>(book);
  return entry[byte & 15] | static_cast<uint32_t>(entry[byte >> 4]) << 16;
}

template <typename T, int NT, bool ONE_BOOK>
__global__ void __launch_bounds__(kLutThreads)
    lut4_tensor_core_kernel(const Lut4GemmParams p, const unsigned m_tiles) {
  LLMKERN_DYNAMIC_SHARED(unsigned char, smem);
  auto* smem_book = reinterpret_cast<uint32_t*>(smem + kLutStages * kLutStageBytes<NT>);
  const Lut4Weight& w = p.w;
  const int tid = threadIdx.x, g = tid % 32 / 4, t = tid % 4;
  // Neighbouring CTAs share rows of w.
  const int64_t first_m = static_cast<int64_t>(blockIdx.x % m_tiles) * 8 * NT;
  const int64_t first_n = static_cast<int64_t>(blockIdx.x / m_tiles) * kLutRows;
  const auto* codes = static_cast<const unsigned char*>(w.qweight);
  const T* x = static_cast<const T*>(p.x);
  const int64_t count = (w.K + kLutColumns - 1) / kLutColumns;

  const auto copy_stage = [&](int64_t i) {
    unsigned char* to = smem + i % kLutStages * kLutStageBytes<NT>;
    {
      const int row = tid / 2;
      const int64_t n = first_n + row, k = i * kLutColumns + tid % 2 * 32;
      const bool valid = n < w.N && k < w.K;
      ptx::cp_async_16(to + row * kCodeStride + tid % 2 * 16,
                       valid ? codes + n * (w.K / 2) + k / 2 : codes, valid);
    }
    T* x_to = reinterpret_cast<T*>(to + kLutCodeBytes);
    for (int piece = tid; piece < 8 * NT * 8; piece += kLutThreads) {
      const int row = piece / 8, column = piece % 8 * 8;
      const int64_t m = first_m + row, k = i * kLutColumns + column;
      const bool valid = m < p.M && k < w.K;
      ptx::cp_async_16(x_to + row * kLutXStride + column, valid ? x + m * p.x_stride + k : x,
                       valid);
    }
  };
  // A book per row: 16 entries of each row, of up to kMaxBooks groups from that of k on.
  const auto copy_books = [&](int64_t k) {
    for (int pair = tid; pair < kMaxBooks * kLutRows * 8; pair += kLutThreads) {
      const int64_t n = first_n + pair / 8 % kLutRows;
      const int64_t group = k / w.group_size + pair / (8 * kLutRows);
      if (n >= w.N || group * w.group_size >= w.K) continue;
      const float* book = w.codebook + n * w.book_row_stride + group * w.book_group_stride;
      smem_book[pair] = to_bits<T>(book[pair % 8 * 2]) | to_bits<T>(book[pair % 8 * 2 + 1]) << 16;
    }
  };

  for (int i = 0; i < kLutStages - 1; i++) {
    if (i < count) copy_stage(i);
    ptx::cp_async_commit();
  }
  if constexpr (ONE_BOOK)
    for (int byte = tid; byte < 256; byte += kLutThreads)
      smem_book[byte] = to_bits<T>(w.codebook[byte & 15]) | to_bits<T>(w.codebook[byte >> 4]) << 16;

  // The lane's two rows; past the end the last one is read and not stored.
  const int row = tid / 32 * 16 + g;
  const int64_t low_n = first_n + row < w.N ? first_n + row : w.N - 1;
  const int64_t high_n = first_n + row + 8 < w.N ? first_n + row + 8 : w.N - 1;
  float acc[NT][4] = {}, sum[NT][4] = {};
  for (int64_t i = 0; i < count; i++) {
    ptx::cp_async_wait<kLutStages - 2>();
    __syncthreads();  // stage i is there for all, and all are done with stage i - 1
    if (const int64_t next = i + kLutStages - 1; next < count) copy_stage(next);
    ptx::cp_async_commit();
    if constexpr (!ONE_BOOK) {
      if (i == 0 || w.book_group_stride) {
        copy_books(i * kLutColumns);
        __syncthreads();
      }
    }
    const unsigned char* stage = smem + i % kLutStages * kLutStageBytes<NT>;
    const T* x_tile = reinterpret_cast<const T*>(stage + kLutCodeBytes);
#pragma unroll
    for (int block = 0; block < kLutColumns / 32; block++) {
      const int64_t k = i * kLutColumns + block * 32, group = k / w.group_size;
      if (k >= w.K) break;
      const uint32_t* book[2] = {smem_book, smem_book};
      if constexpr (!ONE_BOOK) {
        const int64_t held = w.book_group_stride ? group - i * kLutColumns / w.group_size : 0;
        book[0] += (held * kLutRows + row) * 8;
        book[1] = book[0] + 8 * 8;
      }
      const unsigned char* at = stage + row * kCodeStride + block * 16 + t * 4;
      const uint32_t word[2] = {*reinterpret_cast<const uint32_t*>(at),
                                *reinterpret_cast<const uint32_t*>(at + 8 * kCodeStride)};
      uint32_t a[2][4];
#pragma unroll
      for (int j = 0; j < 8; j++)
        a[j / 4][j % 4] = look_up<ONE_BOOK>(book[j % 2], word[j % 2] >> (8 * (j / 2)) & 255);
#pragma unroll
      for (int nt = 0; nt < NT; nt++) {
        const Bytes16 piece = *reinterpret_cast<const Bytes16*>(
            x_tile + (nt * 8 + g) * kLutXStride + block * 32 + t * 8);
        const uint32_t first[2] = {piece.word[0], piece.word[1]};
        const uint32_t second[2] = {piece.word[2], piece.word[3]};
        ptx::mma_m16n8k16<T>(sum[nt], a[0], first);
        ptx::mma_m16n8k16<T>(sum[nt], a[1], second);
      }
      if ((k + 32) % w.group_size != 0) continue;
      const float low = load_scale(w, low_n, group), high = load_scale(w, high_n, group);
#pragma unroll
      for (int nt = 0; nt < NT; nt++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          acc[nt][j] += (j < 2 ? low : high) * sum[nt][j];
          sum[nt][j] = 0.0f;
        }
      }
    }
  }

  __syncthreads();  // the ring becomes the tile of out, [8 NT][kLutOutStride]
  auto* tile_out = reinterpret_cast<float*>(smem);
#pragma unroll
  for (int nt = 0; nt < NT; nt++)
#pragma unroll
    for (int j = 0; j < 4; j++)
      tile_out[(nt * 8 + t * 2 + j % 2) * kLutOutStride + row + j / 2 * 8] = acc[nt][j];
  __syncthreads();
  for (int i = tid; i < 8 * NT * kLutRows; i += kLutThreads) {
    const int64_t m = first_m + i / kLutRows, n = first_n + i % kLutRows;
    if (m >= p.M || n >= w.N) continue;
    float value = tile_out[i / kLutRows * kLutOutStride + i % kLutRows];
    if (p.bias) value += to_float(static_cast<const T*>(p.bias)[n]);
    store(static_cast<T*>(p.out) + m * w.N + n, value);
  }
}

template <typename T, int NT, bool ONE_BOOK>
void launch_lut4_tensor_core(const Lut4GemmParams& p, void* stream) {
  const int64_t m_tiles = ceil_div(p.M, 8 * NT);
  LaunchOptions options;
  options.dynamic_shared_bytes = kLutStages * kLutStageBytes<NT> + kBookBytes<ONE_BOOK>;
  static_assert(kLutStages * kLutStageBytes<NT> >= 8 * NT * kLutOutStride * 4);
  launch_with(options, "lut4_gemm", lut4_tensor_core_kernel<T, NT, ONE_BOOK>,
              m_tiles * ceil_div(p.w.N, kLutRows), kLutThreads, stream, p,
              static_cast<unsigned>(m_tiles));
}

// x and its row stride in 16-byte pieces.
template <typename T>
void lut4_tensor_core(const Lut4GemmParams& p, void* stream) {
  const auto run = [&](auto one_book) {
    constexpr bool kOneBook = decltype(one_book)::value;
    if (p.M <= 16) return launch_lut4_tensor_core<T, 2, kOneBook>(p, stream);
    if (p.M <= 32) return launch_lut4_tensor_core<T, 4, kOneBook>(p, stream);
    return launch_lut4_tensor_core<T, 8, kOneBook>(p, stream);
  };
  if (p.w.book_row_stride || p.w.book_group_stride)
    run(std::false_type());
  else
    run(std::true_type());
}

}  // namespace llmkern::cuda
