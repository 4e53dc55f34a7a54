// Products with a weight that is packed in chunks, on tensor cores: out^T = w x^T, so that weights
// go from registers into operand A and few rows of x fill operand B. What all such formats share.
//
// A CTA of four warps owns 64 columns of out, 8 NT of its rows and a slice of K. A ring of chunks
// (64 x 128 weights with all that decoding them takes) and of x's tiles is filled by asynchronous
// copies: with BULK one bulk copy per chunk, counted by an mbarrier and issued before the grids
// that x comes from have ended; without, cp.async. Slices of K are added in a fixed order, through
// the shared memory of a cluster (BULK) or a workspace. So a row of out depends on neither the
// other rows nor NT.
//
// With BULK the weight is read before the stream's previous grid has ended: whatever writes a
// weight must have another grid behind it (the packers' last ones do not write the chunks).
//
// A Format says how chunks are multiplied. It is a plain struct, which the kernel takes by value:
//
//   static constexpr const char* kOp;     the op's name, for errors
//   static constexpr int kMaxBytes;       of the largest chunk there is
//   int bytes;                            of a chunk, a multiple of 16
//   template <typename T, int NT>         acc += w x^T over one chunk, for a warp's strip of 16
//   rows void multiply(const unsigned char* chunk, const T* x, float (&acc)[NT][4]) const;
//
// Technique: Marlin (arXiv 2408.11743) for fragments packed ahead of time and the ring; operands
// swapped as in Machete. wgmma is left out until there is a GPU to write it against.
#pragma once

#include "cuda/common/chunks.cuh"
#include "cuda/common/dtype.cuh"
#include "cuda/common/launch.h"
#include "cuda/common/ptx.cuh"
#include "cuda/kernels.h"

namespace llmkern::cuda {

constexpr int kTensorThreads = 128;
constexpr int kRowStride = kChunkColumns + 8;  // elements; odd in 16 bytes: no bank conflicts
constexpr int kOutStride = kChunkRows + 4;

// acc += scale * sum for the rows g (low) and g + 8 (high) of a warp's strip; sum is cleared.
template <int NT>
__device__ __forceinline__ void add_scaled(float low, float high, float (&sum)[NT][4],
                                           float (&acc)[NT][4]) {
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      acc[nt][i] += (i < 2 ? low : high) * sum[nt][i];
      sum[nt][i] = 0.0f;
    }
  }
}

template <int NT>
constexpr int kTileBytes = 8 * NT * kRowStride * 2;

constexpr __host__ __device__ int stage_bytes(int tile_bytes, int chunk_bytes) {
  return tile_bytes + (chunk_bytes + 127) / 128 * 128;
}

// As deep as fits in 99 KB, the least a GPU of sm_80 and newer gives a CTA, with the largest
// chunks; eight at most.
template <typename Format, int NT>
constexpr int kStages = 99 * 1024 / stage_bytes(kTileBytes<NT>, Format::kMaxBytes) < 8
                            ? 99 * 1024 / stage_bytes(kTileBytes<NT>, Format::kMaxBytes)
                            : 8;

template <typename Format, typename T, int NT, bool BULK>
__global__ void __launch_bounds__(kTensorThreads)
    chunk_gemm_kernel(const ChunkGemmParams p, const Format format, const ChunkConfig config,
                      const int64_t chunks_per_row, const unsigned m_tiles) {
  constexpr int kDepth = kStages<Format, NT>;
  LLMKERN_DYNAMIC_SHARED(unsigned char, smem);
  LLMKERN_SHARED(uint64_t, arrived, [kDepth]);
  const int stride = stage_bytes(kTileBytes<NT>, format.bytes);
  const int tid = threadIdx.x;
  const int slice = blockIdx.x % config.split;
  const unsigned tile = blockIdx.x / config.split;
  const int64_t first_m = static_cast<int64_t>(tile % m_tiles) * 8 * NT;
  const int64_t first_n = static_cast<int64_t>(tile / m_tiles) * kChunkRows;
  const int64_t first_chunk = chunks_per_row * slice / config.split;
  const int count = static_cast<int>(chunks_per_row * (slice + 1) / config.split - first_chunk);
  const auto* chunks = static_cast<const unsigned char*>(p.chunks) +
                       (tile / m_tiles * chunks_per_row + first_chunk) * format.bytes;
  const T* x = static_cast<const T*>(p.x);

  const auto copy_weights = [&](int i) {
    unsigned char* to = smem + i % kDepth * stride + kTileBytes<NT>;
    const unsigned char* from = chunks + static_cast<int64_t>(i) * format.bytes;
    if constexpr (BULK) {
      if (tid != 0) return;
      ptx::mbarrier_arrive_expect_tx(&arrived[i % kDepth], format.bytes);
      ptx::bulk_copy(to, from, format.bytes, &arrived[i % kDepth]);
    } else {
      for (int at = tid * 16; at < format.bytes; at += kTensorThreads * 16)
        ptx::cp_async_16(to + at, from + at);
    }
  };
  const auto copy_x = [&](int i) {
    T* to = reinterpret_cast<T*>(smem + i % kDepth * stride);
#pragma unroll
    for (int piece = 0; piece < NT; piece++) {
      const int row = (piece * kTensorThreads + tid) / 16, column = tid % 16 * 8;
      const int64_t m = first_m + row, k = (first_chunk + i) * kChunkColumns + column;
      const bool valid = m < p.M && k < p.K;
      ptx::cp_async_16(to + row * kRowStride + column, valid ? x + m * p.x_stride + k : x, valid);
    }
  };

  if constexpr (BULK) {
    if (tid == 0) {
      for (int i = 0; i < kDepth; i++) ptx::mbarrier_init(&arrived[i], 1);
      ptx::mbarrier_init_fence();
    }
    __syncthreads();
    for (int i = 0; i < kDepth - 1 && i < count; i++) copy_weights(i);
    ptx::grid_launch_dependents();
    ptx::grid_dependency_wait();
  }
  for (int i = 0; i < kDepth - 1; i++) {
    if (i < count) {
      if constexpr (!BULK) copy_weights(i);
      copy_x(i);
    }
    ptx::cp_async_commit();
  }

  float acc[NT][4] = {};
  for (int i = 0; i < count; i++) {
    ptx::cp_async_wait<kDepth - 2>();
    if constexpr (BULK) ptx::mbarrier_wait(&arrived[i % kDepth], i / kDepth % 2);
    __syncthreads();  // chunk i is there for all, and all are done with chunk i - 1
    if (const int next = i + kDepth - 1; next < count) {
      copy_weights(next);
      copy_x(next);
    }
    ptx::cp_async_commit();
    const unsigned char* stage = smem + i % kDepth * stride;
    format.template multiply<T, NT>(stage + kTileBytes<NT>, reinterpret_cast<const T*>(stage), acc);
  }

  __syncthreads();  // the ring becomes the tile of out, [8 NT][kOutStride]
  auto* tile_out = reinterpret_cast<float*>(smem);
  const int row = tid / 32 * 16 + tid % 32 / 4;
#pragma unroll
  for (int nt = 0; nt < NT; nt++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      tile_out[(nt * 8 + tid % 4 * 2 + i % 2) * kOutStride + row + i / 2 * 8] = acc[nt][i];
  const bool cluster = BULK && config.split > 1;
  if (cluster)
    ptx::cluster_sync();
  else
    __syncthreads();

  // In a cluster each CTA finishes a part of the tile.
  const int start = cluster ? slice : 0, parts = cluster ? config.split : 1;
  for (int i = start * kTensorThreads + tid; i < 8 * NT * kChunkRows; i += parts * kTensorThreads) {
    const int64_t m = first_m + i / kChunkRows, n = first_n + i % kChunkRows;
    if (m >= p.M || n >= p.N) continue;
    const float* at = &tile_out[i / kChunkRows * kOutStride + i % kChunkRows];
    float sum = *at;
    if (cluster) {
      sum = ptx::cluster_load(at, 0);
      for (int other = 1; other < config.split; other++) sum += ptx::cluster_load(at, other);
    } else if (config.split > 1) {
      config.workspace[(slice * p.M + m) * p.N + n] = sum;
      continue;
    }
    if (p.bias) sum += to_float(static_cast<const T*>(p.bias)[n]);
    store(static_cast<T*>(p.out) + m * p.N + n, sum);
  }
  if (cluster) ptx::cluster_sync();  // no CTA ends before the others have read its tile
}

// The second pass without clusters: adds the slices, in their order.
template <typename T>
__global__ void __launch_bounds__(256)
    chunk_gemm_add_slices_kernel(const ChunkGemmParams p, const ChunkConfig config) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  const int64_t size = p.M * p.N;
  if (i >= size) return;
  float sum = config.workspace[i];
  for (int slice = 1; slice < config.split; slice++) sum += config.workspace[slice * size + i];
  if (p.bias) sum += to_float(static_cast<const T*>(p.bias)[i % p.N]);
  store(static_cast<T*>(p.out) + i, sum);
}

template <typename T, int NT, bool BULK, typename Format>
void launch_chunk_gemm(const ChunkGemmParams& p, const Format& format, const ChunkConfig& config,
                       void* stream) {
  static_assert(kStages<Format, NT> >= 3);
  const int64_t m_tiles = ceil_div(p.M, 8 * NT);
  LaunchOptions options;
  options.dynamic_shared_bytes =
      static_cast<size_t>(kStages<Format, NT>) * stage_bytes(kTileBytes<NT>, format.bytes);
  options.cluster_size = BULK ? config.split : 1;
  options.programmatic = BULK;
  launch_with(options, Format::kOp, chunk_gemm_kernel<Format, T, NT, BULK>,
              m_tiles * ceil_div(p.N, kChunkRows) * config.split, kTensorThreads, stream, p, format,
              config, ceil_div(p.K, kChunkColumns), static_cast<unsigned>(m_tiles));
  if (!BULK && config.split > 1)
    launch(Format::kOp, chunk_gemm_add_slices_kernel<T>, ceil_div(p.M * p.N, 256), 256, stream, p,
           config);
}

// One instance per tile height and way of copying: 8, 16, 32 and 64 rows of x.
template <typename T, typename Format>
void chunk_gemm(const ChunkGemmParams& p, const Format& format, const ChunkConfig& config,
                void* stream) {
  const auto run = [&](auto bulk) {
    constexpr bool kBulk = decltype(bulk)::value;
    if (config.rows == 8) return launch_chunk_gemm<T, 1, kBulk>(p, format, config, stream);
    if (config.rows == 16) return launch_chunk_gemm<T, 2, kBulk>(p, format, config, stream);
    if (config.rows == 32) return launch_chunk_gemm<T, 4, kBulk>(p, format, config, stream);
    return launch_chunk_gemm<T, 8, kBulk>(p, format, config, stream);
  };
  if (config.bulk)
    run(std::true_type());
  else
    run(std::false_type());
}

}  // namespace llmkern::cuda
