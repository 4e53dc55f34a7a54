// Products of many rows of x with a 2:4 sparse weight, bound by arithmetic: out^T = w x^T on
// mma.sp, which takes half the products that a dense weight would.
//
// A CTA of four warps owns 128 columns of out and 128 of its rows, each warp 64 of both: two
// operands from shared memory then feed 32 products per 32 columns of K, which keeps the reads of
// shared memory below the time of the products. The ring holds 64 columns at a time, brought by
// cp.async. K is not split: a row of out depends on no other.
#pragma once

#include <algorithm>

#include "cuda/common/sparse24.cuh"

namespace llmkern::cuda {

constexpr int kSparseTile = 128;
constexpr int kSparseColumns = 64;                  // of K per stage, half a chunk
constexpr int kSparseXStride = kSparseColumns + 8;  // elements; odd in 16 bytes
constexpr int kSparseOutStride = kSparseTile + 4;
constexpr int kSparseXBytes = kSparseTile * kSparseXStride * 2;

__host__ __device__ constexpr int sparse_stage_bytes(int half_bytes) {
  return kSparseXBytes + 2 * half_bytes;
}

// In 99 KB, as the ring of chunk_gemm.cuh; four at most.
template <typename Format>
constexpr int kSparseStages = 99 * 1024 / sparse_stage_bytes(Format::kMaxHalfBytes) < 4
                                  ? 99 * 1024 / sparse_stage_bytes(Format::kMaxHalfBytes)
                                  : 4;

// acc += w x^T over half a chunk: 64 rows of w, 64 rows of x.
template <typename Format, typename T>
__device__ __forceinline__ void multiply_half(const Format& format, const unsigned char* half,
                                              const T* x, float (&acc)[4][8][4]) {
  const T* x_row = lane_of_x(x, kSparseXStride);
  uint32_t metadata[4];
#pragma unroll
  for (int strip = 0; strip < 4; strip++)
    metadata[strip] = load_metadata(half + format.metadata_at(), strip);
#pragma unroll
  for (int step = 0; step < 2; step++) {
    uint32_t a[4][4];
#pragma unroll
    for (int strip = 0; strip < 4; strip++) format.template load<T>(half, strip, step, a[strip]);
#pragma unroll
    for (int nt = 0; nt < 8; nt++) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, x_row + nt * 8 * kSparseXStride + step * 32);
#pragma unroll
      for (int strip = 0; strip < 4; strip++)
        mma_step<T>(step, acc[strip][nt], a[strip], b, metadata[strip]);
    }
  }
}

template <typename Format, typename T>
__global__ void __launch_bounds__(kTensorThreads, 2)
    sparse24_tile_kernel(const ChunkGemmParams p, const Format format, const int64_t chunks_per_row,
                         const int64_t chunk_rows, const unsigned m_tiles) {
  constexpr int kDepth = kSparseStages<Format>;
  LLMKERN_DYNAMIC_SHARED(unsigned char, smem);
  const int stage_bytes = sparse_stage_bytes(format.half_bytes);
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int64_t first_m = static_cast<int64_t>(blockIdx.x % m_tiles) * kSparseTile;
  const int64_t first_n = static_cast<int64_t>(blockIdx.x / m_tiles) * kSparseTile;
  const int count = static_cast<int>((p.K + kSparseColumns - 1) / kSparseColumns);
  const auto* chunks = static_cast<const unsigned char*>(p.chunks);
  const T* x = static_cast<const T*>(p.x);

  const auto copy_stage = [&](int i) {
    unsigned char* to = smem + i % kDepth * stage_bytes;
    T* x_to = reinterpret_cast<T*>(to);
#pragma unroll
    for (int piece = 0; piece < 8; piece++) {
      const int row = piece * 16 + tid / 8, column = tid % 8 * 8;
      const int64_t m = first_m + row, k = static_cast<int64_t>(i) * kSparseColumns + column;
      const bool valid = m < p.M && k < p.K;
      ptx::cp_async_16(x_to + row * kSparseXStride + column, valid ? x + m * p.x_stride + k : x,
                       valid);
    }
#pragma unroll
    for (int side = 0; side < 2; side++) {
      // Past the last rows of chunks the last ones are multiplied again, and not stored.
      const int64_t row = first_n / kChunkRows + side;
      const int64_t chunk = (row < chunk_rows ? row : chunk_rows - 1) * chunks_per_row + i / 2;
      const unsigned char* from = chunks + chunk * format.bytes;
      for (int at = tid * 16; at < format.half_bytes; at += kTensorThreads * 16)
        ptx::cp_async_16(to + kSparseXBytes + side * format.half_bytes + at,
                         from + format.source(i % 2, at));
    }
  };

  for (int i = 0; i < kDepth - 1; i++) {
    if (i < count) copy_stage(i);
    ptx::cp_async_commit();
  }
  float acc[4][8][4] = {};
  for (int i = 0; i < count; i++) {
    ptx::cp_async_wait<kDepth - 2>();
    __syncthreads();  // stage i is there for all, and all are done with stage i - 1
    if (const int next = i + kDepth - 1; next < count) copy_stage(next);
    ptx::cp_async_commit();
    const unsigned char* stage = smem + i % kDepth * stage_bytes;
    multiply_half<Format, T>(format, stage + kSparseXBytes + warp % 2 * format.half_bytes,
                             reinterpret_cast<const T*>(stage) + warp / 2 * 64 * kSparseXStride,
                             acc);
  }

  __syncthreads();  // the ring becomes the tile of out, [128][kSparseOutStride]
  auto* tile_out = reinterpret_cast<float*>(smem);
#pragma unroll
  for (int strip = 0; strip < 4; strip++)
#pragma unroll
    for (int nt = 0; nt < 8; nt++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int m = warp / 2 * 64 + nt * 8 + lane % 4 * 2 + i % 2;
        const int n = warp % 2 * 64 + strip * 16 + lane / 4 + i / 2 * 8;
        tile_out[m * kSparseOutStride + n] = acc[strip][nt][i];
      }
  __syncthreads();
  const int64_t n = first_n + tid;
  if (n >= p.N) return;
  const float bias = p.bias ? to_float(static_cast<const T*>(p.bias)[n]) : 0.0f;
  for (int row = 0; row < kSparseTile && first_m + row < p.M; row++)
    store(static_cast<T*>(p.out) + (first_m + row) * p.N + n,
          tile_out[row * kSparseOutStride + tid] + bias);
}

template <typename T, typename Format>
void sparse24_tile(const ChunkGemmParams& p, const Format& format, void* stream) {
  static_assert(kSparseStages<Format> >= 3);
  const int64_t m_tiles = ceil_div(p.M, kSparseTile);
  LaunchOptions options;
  options.dynamic_shared_bytes =
      std::max<size_t>(kSparseStages<Format> * sparse_stage_bytes(format.half_bytes),
                       kSparseTile * kSparseOutStride * sizeof(float));
  launch_with(options, Format::kOp, sparse24_tile_kernel<Format, T>,
              m_tiles * ceil_div(p.N, kSparseTile), kTensorThreads, stream, p, format,
              ceil_div(p.K, kChunkColumns), ceil_div(p.N, kChunkRows),
              static_cast<unsigned>(m_tiles));
}

// The tier that `config` asks for.
template <typename Format>
void sparse24(const ChunkGemmParams& p, DType dtype, const Format& format,
              const ChunkConfig& config, void* stream) {
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (!std::is_same_v<T, float>) {
      if (config.rows == kSparseTile) return sparse24_tile<T>(p, format, stream);
      chunk_gemm<T>(p, format, config, stream);
    }
  });
}

}  // namespace llmkern::cuda
