// pack_chunks, unpack_chunks: 4-bit weights from the canonical layouts to the CUDA ones and back,
// bit for bit. Layouts: llmkern/formats/int4.py, lut4.py and int4_cuda.py, lut4_cuda.py.
//
// Bound by memory: every byte is read and written once. A CTA owns a chunk, 64 rows by 128 columns;
// its threads take words of codes, then scales, zero points and books in turn.
//
// Not yet run on a GPU: tested in the emulator (csrc/emu) and compiled ahead of time only.

#include "cuda/common/chunks.cuh"
#include "cuda/common/launch.h"
#include "cuda/kernels.h"

namespace llmkern::cuda {
namespace {

constexpr int kThreads = 256;

// One chunk: where it begins, and what lies in it.
struct Place {
  unsigned char* chunk;
  int64_t first_n, first_k;
  int group_size, groups;                  // columns per scale in the chunk; scales per row
  int scales_at, zeros_at, books_at, end;  // in bytes

  __host__ __device__ Place(const PackChunksParams& p, int64_t index) {
    const int64_t per_row = (p.K + kChunkColumns - 1) / kChunkColumns;
    group_size = inline_group_size(p.group_size);
    groups = kChunkColumns / group_size;
    scales_at = kCodeBytes;
    zeros_at = scales_at + (p.scales ? groups * kChunkRows * p.scale_bytes : 0);
    books_at = zeros_at + (p.zeros ? groups * kChunkRows : 0);
    end = books_at + (p.books ? groups * kChunkRows * 64 : 0);
    chunk = p.chunks + index * end;
    first_n = index / per_row * kChunkRows;
    first_k = index % per_row * kChunkColumns;
  }
};

// The row of a chunk whose scale stands at `at` of the 64 of a group.
__device__ __forceinline__ int row_of_grid(int at) {
  return at / 16 * 16 + at % 2 * 8 + at % 16 / 2;
}

// Pairs of codes p0 .. p3, a byte each, to a lane's word, and back.
__device__ __forceinline__ uint32_t to_word(uint32_t pairs, bool split) {
  if (!split) return pairs;
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t pair = pairs >> (8 * i);
    word |= (pair & 15) << (4 * i) | (pair >> 4 & 15) << (4 * i + 16);
  }
  return word;
}

__device__ __forceinline__ uint32_t to_pairs(uint32_t word, bool split) {
  if (!split) return word;
  uint32_t pairs = 0;
#pragma unroll
  for (int i = 0; i < 4; i++)
    pairs |= (word >> (4 * i) & 15) << (8 * i) | (word >> (4 * i + 16) & 15) << (8 * i + 4);
  return pairs;
}

__device__ __forceinline__ void copy_element(void* to, int64_t to_at, const void* from,
                                             int64_t from_at, int bytes) {
  if (bytes == 4)
    static_cast<uint32_t*>(to)[to_at] = static_cast<const uint32_t*>(from)[from_at];
  else
    static_cast<uint16_t*>(to)[to_at] = static_cast<const uint16_t*>(from)[from_at];
}

__device__ __forceinline__ void clear_element(void* to, int64_t at, int bytes) {
  if (bytes == 4)
    static_cast<uint32_t*>(to)[at] = 0;
  else
    static_cast<uint16_t*>(to)[at] = 0;
}

__global__ void __launch_bounds__(kThreads) pack_chunks_kernel(const PackChunksParams p) {
  const Place to(p, blockIdx.x);
  const int64_t row_words = p.K / 8, row_groups = p.K / p.group_size;
  auto* words = reinterpret_cast<uint32_t*>(to.chunk);
  for (int i = threadIdx.x; i < kCodeBytes / 4; i += kThreads) {
    // Word [half, strip, lane, j] has rows g and g + 8, columns 2t, 2t + 1 and those after 8 more.
    const int j = i % 4, lane = i / 4 % 32, strip = i / 128 % 4, half = i / 512;
    const int64_t n = to.first_n + strip * 16 + lane / 4;
    const int64_t first = to.first_k / 8 + (half * 4 + j) * 2;
    uint32_t pairs = 0;
#pragma unroll
    for (int pair = 0; pair < 4; pair++) {
      const int64_t row = n + pair % 2 * 8, word = first + pair / 2;
      if (row >= p.N || word >= row_words) continue;
      pairs |= (p.qweight[row * row_words + word] >> (8 * (lane % 4)) & 255) << (8 * pair);
    }
    words[i] = to_word(pairs, p.split_pairs);
  }
  for (int i = threadIdx.x; i < to.groups * kChunkRows; i += kThreads) {
    const int64_t n = to.first_n + row_of_grid(i % kChunkRows);
    const int64_t k = to.first_k + i / kChunkRows * to.group_size, g = k / p.group_size;
    const bool valid = n < p.N && k < p.K;
    if (p.scales && valid)
      copy_element(to.chunk + to.scales_at, i, p.scales, n * row_groups + g, p.scale_bytes);
    else if (p.scales)
      clear_element(to.chunk + to.scales_at, i, p.scale_bytes);
    if (p.zeros)
      to.chunk[to.zeros_at + i] = valid ? p.zeros[n / 8 * row_groups + g] >> (n % 8 * 4) & 15 : 0;
  }
  if (!p.books) return;
  auto* books = reinterpret_cast<float*>(to.chunk + to.books_at);
  for (int i = threadIdx.x; i < to.groups * kChunkRows * 16; i += kThreads) {
    const int64_t n = to.first_n + i / 16 % kChunkRows;
    const int64_t k = to.first_k + i / 16 / kChunkRows * to.group_size;
    const bool valid = n < p.N && k < p.K;
    books[i] = valid ? p.books[(n * row_groups + k / p.group_size) * 16 + i % 16] : 0.0f;
  }
}

__global__ void __launch_bounds__(kThreads) unpack_chunks_kernel(const PackChunksParams p) {
  const Place from(p, blockIdx.x);
  const int64_t row_words = p.K / 8, row_groups = p.K / p.group_size;
  const auto* words = reinterpret_cast<const uint32_t*>(from.chunk);
  for (int i = threadIdx.x; i < kCodeBytes / 4; i += kThreads) {
    const int row = i / 16, word = i % 16;
    const int64_t n = from.first_n + row, at = from.first_k / 8 + word;
    if (n >= p.N || at >= row_words) continue;
    const int step = word / 2, pair = row % 16 / 8 + word % 2 * 2;
    const uint32_t* place = words + ((step / 4 * 4 + row / 16) * 32 + row % 8 * 4) * 4 + step % 4;
    uint32_t codes = 0;
#pragma unroll
    for (int t = 0; t < 4; t++)
      codes |= (to_pairs(place[t * 4], p.split_pairs) >> (8 * pair) & 255) << (8 * t);
    p.qweight[n * row_words + at] = codes;
  }
  // Groups longer than 128 columns are repeated: the chunk in which one begins gives it back.
  const auto begins = [&](int group) {
    const int64_t k = from.first_k + group * from.group_size;
    return k < p.K && k % p.group_size == 0;
  };
  for (int i = threadIdx.x; i < from.groups * kChunkRows; i += kThreads) {
    const int group = i / kChunkRows;
    const int64_t n = from.first_n + row_of_grid(i % kChunkRows);
    const int64_t g = (from.first_k + group * from.group_size) / p.group_size;
    if (p.scales && n < p.N && begins(group))
      copy_element(p.scales, n * row_groups + g, from.chunk + from.scales_at, i, p.scale_bytes);
  }
  for (int i = threadIdx.x; p.zeros && i < from.groups * kChunkRows / 8; i += kThreads) {
    const int group = i / 8, row = i % 8 * 8;
    const int64_t n = from.first_n + row;
    if (n >= p.N || !begins(group)) continue;
    uint32_t word = 0;
#pragma unroll
    for (int r = 0; r < 8; r++)
      word |= static_cast<uint32_t>(
                  from.chunk[from.zeros_at + group * kChunkRows + grid_index(row + r)])
              << (4 * r);
    p.zeros[n / 8 * row_groups + (from.first_k + group * from.group_size) / p.group_size] = word;
  }
  const auto* books = reinterpret_cast<const float*>(from.chunk + from.books_at);
  for (int i = threadIdx.x; p.books && i < from.groups * kChunkRows * 16; i += kThreads) {
    const int group = i / 16 / kChunkRows;
    const int64_t n = from.first_n + i / 16 % kChunkRows;
    if (n >= p.N || !begins(group)) continue;
    const int64_t g = (from.first_k + group * from.group_size) / p.group_size;
    p.books[(n * row_groups + g) * 16 + i % 16] = books[i];
  }
}

int64_t chunk_count(const PackChunksParams& p) {
  return ceil_div(p.N, kChunkRows) * ceil_div(p.K, kChunkColumns);
}

}  // namespace

void pack_chunks(const PackChunksParams& p, void* stream) {
  launch("pack_chunks", pack_chunks_kernel, chunk_count(p), kThreads, stream, p);
}

void unpack_chunks(const PackChunksParams& p, void* stream) {
  launch("unpack_chunks", unpack_chunks_kernel, chunk_count(p), kThreads, stream, p);
}

}  // namespace llmkern::cuda
