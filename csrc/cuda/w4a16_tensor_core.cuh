// The tensor core tiers of w4a16_gemm, over weights in the CUDA layout
// (llmkern/formats/int4_cuda.py): out^T = w x^T, so that weights go from registers into operand A
// of mma.sync m16n8k16 and few rows of x fill operand B.
//
// A CTA of four warps owns 64 columns of out, 8 NT of its rows and a slice of K. A ring of chunks
// (64 x 128 weights with their scales, 4.1 KB and more) and of x's tiles is filled by asynchronous
// copies: with BULK one bulk copy per chunk, counted by an mbarrier and issued before the grids
// that x comes from have ended; without, cp.async. Per scale group the products of x and the exact
// integers code - zero are summed by the tensor core, then scaled in float32: no weight is ever
// rounded. Slices of K are added in a fixed order, through the shared memory of a cluster (BULK) or
// a workspace. So a row of out depends on neither the other rows nor NT.
//
// With BULK the weight is read before the stream's previous grid has ended: whatever writes a
// weight must have another grid behind it (to_cuda_layout's last one does not write qweight).
//
// Not yet run on a GPU: tested in the emulator (csrc/emu) and compiled ahead of time only; tiles,
// ring depths and tiers are not tuned.
//
// Technique: Marlin (arXiv 2408.11743) for fragments packed ahead of time and the ring; operands
// swapped as in Machete. wgmma is left out until there is a GPU to write it against.
#pragma once

#include "cuda/common/dequant.cuh"
#include "cuda/common/dtype.cuh"
#include "cuda/common/launch.h"
#include "cuda/common/ptx.cuh"
#include "cuda/kernels.h"

namespace llmkern::cuda {

constexpr int kTensorThreads = 128;
constexpr int kRowStride = kChunkColumns + 8;  // elements; odd in 16 bytes: no bank conflicts
constexpr int kOutStride = kChunkRows + 4;

// As deep as fits in 99 KB, the least a GPU of sm_80 and newer gives a CTA, with the largest
// chunks.
template <int NT>
constexpr int kStages = NT <= 2   ? 8
                        : NT == 4 ? 7
                                  : 4;

template <int NT>
constexpr int kTileBytes = 8 * NT * kRowStride * 2;

// The scale of one row and group of the chunk.
__device__ __forceinline__ float chunk_scale(const unsigned char* chunk, int i, DType dtype) {
  return load_as(chunk + kCodeBytes, i, dtype);
}

// acc += w x^T over one chunk, for a warp's strip of 16 rows.
template <typename T, int NT>
__device__ __forceinline__ void multiply_chunk(const unsigned char* chunk, const T* x,
                                               const Int4Chunks& shape, DType scales_dtype,
                                               bool has_zeros, float (&acc)[NT][4]) {
  const int lane = threadIdx.x % 32, strip = threadIdx.x / 32;
  const int steps = shape.group_size / 16;  // per group: 2, 4 or 8
  const int grid_at = strip * 16 + lane / 4 * 2;
  // ldmatrix: lanes 8 i .. 8 i + 7 point at the rows of matrix i: columns 0-7 and 8-15 of rows of x
  // 0-7, then of rows 8-15.
  const T* x_row = x + (lane % 8 + lane / 16 * 8) * kRowStride + lane / 8 % 2 * 8;
  float sum[NT][4] = {};
  uint32_t zero[2] = {biased_zero<T>(8), biased_zero<T>(8)};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const Bytes16 words = reinterpret_cast<const Bytes16*>(chunk)[(half * 4 + strip) * 32 + lane];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int step = 4 * half + j;
      if (has_zeros && step % steps == 0) {
        const unsigned char* zeros = chunk + shape.zeros_at + step / steps * kChunkRows + grid_at;
        zero[0] = biased_zero<T>(zeros[0]);
        zero[1] = biased_zero<T>(zeros[1]);
      }
      uint32_t a[4];
      unpack_fragment<T>(words.word[j], zero, a);
      if constexpr (NT == 1) {
        uint32_t b[2];
        ptx::ldmatrix_x2(b, x_row - lane / 16 * 8 * kRowStride + step * 16);
        ptx::mma_m16n8k16<T>(sum[0], a, b);
      } else {
#pragma unroll
        for (int nt = 0; nt < NT; nt += 2) {
          uint32_t b[4];
          ptx::ldmatrix_x4(b, x_row + nt * 8 * kRowStride + step * 16);
          const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
          ptx::mma_m16n8k16<T>(sum[nt], a, first);
          ptx::mma_m16n8k16<T>(sum[nt + 1], a, second);
        }
      }
      if ((step + 1) % steps != 0) continue;
      const int at = step / steps * kChunkRows + grid_at;
      const float low = chunk_scale(chunk, at, scales_dtype);
      const float high = chunk_scale(chunk, at + 1, scales_dtype);
#pragma unroll
      for (int nt = 0; nt < NT; nt++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          acc[nt][i] += (i < 2 ? low : high) * sum[nt][i];
          sum[nt][i] = 0.0f;
        }
      }
    }
  }
}

template <typename T, int NT, bool BULK>
__global__ void __launch_bounds__(kTensorThreads)
    w4a16_tensor_core_kernel(const W4A16GemmParams p, const W4A16Config config,
                             const Int4Chunks shape, const int stage_bytes,
                             const unsigned m_tiles) {
  constexpr int kDepth = kStages<NT>;
  LLMKERN_DYNAMIC_SHARED(unsigned char, smem);
  LLMKERN_SHARED(uint64_t, arrived, [kDepth]);
  const Int4Weight& w = p.w;
  const int tid = threadIdx.x;
  const int slice = blockIdx.x % config.split;
  const unsigned tile = blockIdx.x / config.split;
  const int64_t first_m = static_cast<int64_t>(tile % m_tiles) * 8 * NT;
  const int64_t first_n = static_cast<int64_t>(tile / m_tiles) * kChunkRows;
  const int64_t first_chunk = shape.per_row * slice / config.split;
  const int count = static_cast<int>(shape.per_row * (slice + 1) / config.split - first_chunk);
  const auto* chunks = static_cast<const unsigned char*>(w.qweight) +
                       (tile / m_tiles * shape.per_row + first_chunk) * shape.bytes;
  const T* x = static_cast<const T*>(p.x);

  const auto copy_weights = [&](int i) {
    unsigned char* to = smem + i % kDepth * stage_bytes + kTileBytes<NT>;
    const unsigned char* from = chunks + static_cast<int64_t>(i) * shape.bytes;
    if constexpr (BULK) {
      if (tid != 0) return;
      ptx::mbarrier_arrive_expect_tx(&arrived[i % kDepth], shape.bytes);
      ptx::bulk_copy(to, from, shape.bytes, &arrived[i % kDepth]);
    } else {
      for (int at = tid * 16; at < shape.bytes; at += kTensorThreads * 16)
        ptx::cp_async_16(to + at, from + at);
    }
  };
  const auto copy_x = [&](int i) {
    T* to = reinterpret_cast<T*>(smem + i % kDepth * stage_bytes);
#pragma unroll
    for (int piece = 0; piece < NT; piece++) {
      const int row = (piece * kTensorThreads + tid) / 16, column = tid % 16 * 8;
      const int64_t m = first_m + row, k = (first_chunk + i) * kChunkColumns + column;
      const bool valid = m < p.M && k < w.K;
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
    const unsigned char* stage = smem + i % kDepth * stage_bytes;
    multiply_chunk<T, NT>(stage + kTileBytes<NT>, reinterpret_cast<const T*>(stage), shape,
                          w.scales_dtype, w.zeros != nullptr, acc);
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
    if (m >= p.M || n >= w.N) continue;
    const float* at = &tile_out[i / kChunkRows * kOutStride + i % kChunkRows];
    float sum = *at;
    if (cluster) {
      sum = ptx::cluster_load(at, 0);
      for (int other = 1; other < config.split; other++) sum += ptx::cluster_load(at, other);
    } else if (config.split > 1) {
      config.workspace[(slice * p.M + m) * w.N + n] = sum;
      continue;
    }
    if (p.bias) sum += to_float(static_cast<const T*>(p.bias)[n]);
    store(static_cast<T*>(p.out) + m * w.N + n, sum);
  }
  if (cluster) ptx::cluster_sync();  // no CTA ends before the others have read its tile
}

// The second pass without clusters: adds the slices, in their order.
template <typename T>
__global__ void __launch_bounds__(256)
    w4a16_add_slices_kernel(const W4A16GemmParams p, const W4A16Config config) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  const int64_t size = p.M * p.w.N;
  if (i >= size) return;
  float sum = config.workspace[i];
  for (int slice = 1; slice < config.split; slice++) sum += config.workspace[slice * size + i];
  if (p.bias) sum += to_float(static_cast<const T*>(p.bias)[i % p.w.N]);
  store(static_cast<T*>(p.out) + i, sum);
}

template <typename T, int NT, bool BULK>
void launch_tensor_core(const W4A16GemmParams& p, const W4A16Config& config, void* stream) {
  const Int4Chunks shape = int4_chunks(p.w);
  const int stage_bytes = kTileBytes<NT> + (shape.bytes + 127) / 128 * 128;
  const int64_t m_tiles = ceil_div(p.M, 8 * NT);
  LaunchOptions options;
  options.dynamic_shared_bytes = static_cast<size_t>(kStages<NT>) * stage_bytes;
  options.cluster_size = BULK ? config.split : 1;
  options.programmatic = BULK;
  launch_with(options, "w4a16_gemm", w4a16_tensor_core_kernel<T, NT, BULK>,
              m_tiles * ceil_div(p.w.N, kChunkRows) * config.split, kTensorThreads, stream, p,
              config, shape, stage_bytes, static_cast<unsigned>(m_tiles));
  if (!BULK && config.split > 1)
    launch("w4a16_gemm", w4a16_add_slices_kernel<T>, ceil_div(p.M * p.w.N, 256), 256, stream, p,
           config);
}

// One instance per tile height and way of copying: 8, 16, 32 and 64 rows of x.
template <typename T>
void w4a16_tensor_core(const W4A16GemmParams& p, const W4A16Config& config, void* stream) {
  const auto run = [&](auto bulk) {
    constexpr bool kBulk = decltype(bulk)::value;
    if (config.rows == 8) return launch_tensor_core<T, 1, kBulk>(p, config, stream);
    if (config.rows == 16) return launch_tensor_core<T, 2, kBulk>(p, config, stream);
    if (config.rows == 32) return launch_tensor_core<T, 4, kBulk>(p, config, stream);
    return launch_tensor_core<T, 8, kBulk>(p, config, stream);
  };
  if (config.bulk)
    run(std::true_type());
  else
    run(std::false_type());
}

}  // namespace llmkern::cuda
