// Products with a weight that is packed in chunks, on tensor cores: out^T = w x^T, so that weights
// go from registers into operand A and few rows of x fill operand B. What all such formats share.
//
// A CTA owns a tile of out and a slice of K: four warps 64 columns by 8 NT rows (NarrowTile), eight
// warps 128 by 128 (WideTile). Two rings of shared memory are filled by asynchronous copies: one of
// chunks (64 x 128 weights with all that decoding them takes), one of x's tiles, which come from L2
// and need less depth. With BULK chunks come by one bulk copy each, counted by an mbarrier and
// issued before the grids that x comes from have ended; without, everything by cp.async and both
// rings are equally deep. Slices of K are added in a fixed order, through the shared memory of a
// cluster (BULK) or a workspace. So a row of out depends on neither the other rows nor the tile.
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
// and, if it has them,
//
//   static constexpr bool kWide;          whether it serves WideTile, by
//   template <typename T, int NT, int STRIPS>   the same for strips `strip` and following of a CTA
//   void multiply(const unsigned char* chunk, int strip, const T* x,
//                 float (&acc)[STRIPS][NT][4]) const;
//
//   static constexpr bool kTable;         whether decoding looks values up in a table of the CTA,
//   int table_bytes(int rows) const;      for `rows` rows of w, which
//   template <typename T>                 every thread of the CTA takes part in writing, from the
//   void fill_table(void* table, int64_t first_n, int rows);    row first_n of w on
//
// Technique: Marlin (arXiv 2408.11743) for fragments packed ahead of time and the ring; operands
// swapped as in Machete. wgmma is left out until there is a GPU to write it against.
#pragma once

#include <type_traits>

#include "cuda/common/chunks.cuh"
#include "cuda/common/dtype.cuh"
#include "cuda/common/launch.h"
#include "cuda/common/ptx.cuh"
#include "cuda/kernels.h"

namespace llmkern::cuda {

// A product with a weight in one of the CUDA layouts, whose chunks hold all that decoding them
// takes.
struct ChunkGemmParams {
  const void* x;       // [M, K], row stride x_stride; both in 16-byte pieces
  const void* chunks;  // [ceil(N / 64), ceil(K / 128), bytes], 16-byte aligned
  const void* bias;    // [N] in x's type, or null
  void* out;           // [M, N]
  int64_t M, N, K, x_stride;
};

constexpr int kTensorThreads = 128;
constexpr int kRowStride = kChunkColumns + 8;  // elements; odd in 16 bytes: no bank conflicts

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

// Four warps side by side along N, each a strip of 16 rows of w and all rows of x.
template <int NT>
struct NarrowTile {
  static constexpr int kNT = NT, kStrips = 1, kChunks = 1, kRows = 8 * NT, kXStages = 4;
  static constexpr int kThreads = kTensorThreads;
  static __device__ __forceinline__ int first_strip() { return threadIdx.x / 32; }
  static __device__ __forceinline__ int first_row() { return 0; }
};

// Eight warps, four along N by two along M: each unpacks two strips for 64 rows of x, so that
// reading operands from shared memory takes less time than multiplying them.
struct WideTile {
  static constexpr int kNT = 8, kStrips = 2, kChunks = 2, kRows = 128, kXStages = 3;
  static constexpr int kThreads = 2 * kTensorThreads;
  static __device__ __forceinline__ int first_strip() { return threadIdx.x / 32 % 4 * 2; }
  static __device__ __forceinline__ int first_row() { return threadIdx.x / 128 * 64; }
};

template <typename Format, typename = void>
constexpr bool kServesWide = false;
template <typename Format>
constexpr bool kServesWide<Format, std::void_t<decltype(Format::kWide)>> = Format::kWide;
template <typename Format, typename = void>
constexpr bool kHasTable = false;
template <typename Format>
constexpr bool kHasTable<Format, std::void_t<decltype(Format::kTable)>> = Format::kTable;

constexpr int kMaxStages = 16;

// What a CTA's dynamic shared memory holds, in this order; the table comes last.
template <typename Tile>
struct ChunkRings {
  static constexpr int kXBytes = Tile::kRows * kRowStride * 2;  // of one tile of x

  int stages, stride;  // of the ring of chunks; bytes from chunk to chunk

  __host__ __device__ ChunkRings(int stages, int chunk_bytes)
      : stages(stages), stride((chunk_bytes + 127) / 128 * 128) {}
  __host__ __device__ __forceinline__ int x(int slot) const { return slot * kXBytes; }
  __host__ __device__ __forceinline__ int chunk(int slot) const {
    return Tile::kXStages * kXBytes + slot * Tile::kChunks * stride;
  }
  __host__ __device__ __forceinline__ int table() const { return chunk(stages); }
};

template <typename Format, typename T, typename Tile, bool BULK>
__device__ __forceinline__ void multiply_tile(const ChunkGemmParams& p, Format& format,
                                              const ChunkConfig& config,
                                              const int64_t chunks_per_row,
                                              const unsigned m_tiles) {
  constexpr int NT = Tile::kNT, kXStages = Tile::kXStages;
  LLMKERN_DYNAMIC_SHARED(unsigned char, smem);
  LLMKERN_SHARED(uint64_t, arrived, [kMaxStages]);
  const ChunkRings<Tile> rings(config.stages, format.bytes);
  const int tid = threadIdx.x;
  const int slice = blockIdx.x % config.split;
  const unsigned tile = blockIdx.x / config.split;
  const int64_t first_m = static_cast<int64_t>(tile % m_tiles) * Tile::kRows;
  const int64_t chunk_row = static_cast<int64_t>(tile / m_tiles) * Tile::kChunks;
  const int64_t first_chunk = chunks_per_row * slice / config.split;
  const int count = static_cast<int>(chunks_per_row * (slice + 1) / config.split - first_chunk);
  const auto* chunks = static_cast<const unsigned char*>(p.chunks) +
                       (chunk_row * chunks_per_row + first_chunk) * format.bytes;
  // Past the last rows of chunks the last ones are multiplied again, and not stored.
  const int64_t next_row =
      (chunk_row + 1) * kChunkRows < p.N ? chunks_per_row * format.bytes : int64_t{0};
  const T* x = static_cast<const T*>(p.x);

  const auto copy_weights = [&](int i, int slot) {
    unsigned char* to = smem + rings.chunk(slot);
    const unsigned char* from = chunks + static_cast<int64_t>(i) * format.bytes;
    if constexpr (BULK) {
      if (tid != 0) return;
      ptx::mbarrier_arrive_expect_tx(&arrived[slot], Tile::kChunks * format.bytes);
#pragma unroll
      for (int side = 0; side < Tile::kChunks; side++)
        ptx::bulk_copy(to + side * rings.stride, from + side * next_row, format.bytes,
                       &arrived[slot]);
    } else {
#pragma unroll
      for (int side = 0; side < Tile::kChunks; side++)
        for (int at = tid * 16; at < format.bytes; at += Tile::kThreads * 16)
          ptx::cp_async_16(to + side * rings.stride + at, from + side * next_row + at);
    }
  };
  const auto copy_x = [&](int i) {
    T* to = reinterpret_cast<T*>(smem + rings.x(i % kXStages));
#pragma unroll
    for (int piece = 0; piece < Tile::kRows * 16 / Tile::kThreads; piece++) {
      const int row = (piece * Tile::kThreads + tid) / 16, column = tid % 16 * 8;
      const int64_t m = first_m + row, k = (first_chunk + i) * kChunkColumns + column;
      const bool valid = m < p.M && k < p.K;
      ptx::cp_async_16(to + row * kRowStride + column, valid ? x + m * p.x_stride + k : x, valid);
    }
  };

  if constexpr (BULK) {
    if (tid == 0) {
      for (int i = 0; i < rings.stages; i++) ptx::mbarrier_init(&arrived[i], 1);
      ptx::mbarrier_init_fence();
    }
    __syncthreads();
    for (int i = 0; i < rings.stages - 1 && i < count; i++) copy_weights(i, i);
    ptx::grid_launch_dependents();
  }
  if constexpr (kHasTable<Format>)
    format.template fill_table<T>(smem + rings.table(), chunk_row * kChunkRows,
                                  Tile::kChunks * kChunkRows);
  if constexpr (BULK) ptx::grid_dependency_wait();
  for (int i = 0; i < kXStages - 1; i++) {
    if (i < count) {
      if constexpr (!BULK) copy_weights(i, i);
      copy_x(i);
    }
    ptx::cp_async_commit();
  }

  const int strip = Tile::first_strip();
  float acc[Tile::kStrips][NT][4] = {};
  int slot = 0, parity = 0;  // of chunk i in its ring
  for (int i = 0; i < count; i++) {
    ptx::cp_async_wait<kXStages - 2>();
    if constexpr (BULK) ptx::mbarrier_wait(&arrived[slot], parity);
    __syncthreads();  // chunk i is there for all, and all are done with chunk i - 1
    if (const int next = i + rings.stages - 1; next < count)
      copy_weights(next, slot == 0 ? rings.stages - 1 : slot - 1);
    if (i + kXStages - 1 < count) copy_x(i + kXStages - 1);
    ptx::cp_async_commit();
    const unsigned char* chunk = smem + rings.chunk(slot) + strip / 4 * rings.stride;
    const T* x_tile =
        reinterpret_cast<const T*>(smem + rings.x(i % kXStages)) + Tile::first_row() * kRowStride;
    if constexpr (Tile::kStrips == 1)
      format.template multiply<T, NT>(chunk, x_tile, acc[0]);
    else
      format.template multiply<T, NT, Tile::kStrips>(chunk, strip, x_tile, acc);
    if (++slot == rings.stages) {
      slot = 0;
      parity ^= 1;
    }
  }

  // The ring of x becomes the tile of out.
  constexpr int kColumns = Tile::kChunks * kChunkRows, kStride = kColumns + 4;
  static_assert(Tile::kRows * kStride * 4 <= kXStages * ChunkRings<Tile>::kXBytes);
  __syncthreads();
  auto* tile_out = reinterpret_cast<float*>(smem);
#pragma unroll
  for (int s = 0; s < Tile::kStrips; s++)
#pragma unroll
    for (int nt = 0; nt < NT; nt++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int m = Tile::first_row() + nt * 8 + tid % 4 * 2 + i % 2;
        tile_out[m * kStride + (strip + s) * 16 + tid % 32 / 4 + i / 2 * 8] = acc[s][nt][i];
      }
  const bool cluster = BULK && config.split > 1;
  if (cluster)
    ptx::cluster_sync();
  else
    __syncthreads();

  // In a cluster each CTA finishes a part of the tile.
  const int start = cluster ? slice : 0, parts = cluster ? config.split : 1;
  for (int i = start * Tile::kThreads + tid; i < Tile::kRows * kColumns;
       i += parts * Tile::kThreads) {
    const int64_t m = first_m + i / kColumns, n = chunk_row * kChunkRows + i % kColumns;
    if (m >= p.M || n >= p.N) continue;
    const float* at = &tile_out[i / kColumns * kStride + i % kColumns];
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

template <typename Format, typename T, typename Tile, bool BULK>
__global__ void __launch_bounds__(Tile::kThreads)
    chunk_gemm_kernel(const ChunkGemmParams p, Format format, const ChunkConfig config,
                      const int64_t chunks_per_row, const unsigned m_tiles) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if constexpr (BULK)
    __trap();  // never launched here: nothing to compile
  else
#endif
    multiply_tile<Format, T, Tile, BULK>(p, format, config, chunks_per_row, m_tiles);
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

// Dynamic shared memory of a CTA.
template <typename Tile, typename Format>
int chunk_shared_bytes(const Format& format, int stages) {
  const int end = ChunkRings<Tile>(stages, format.bytes).table();
  if constexpr (kHasTable<Format>) return end + format.table_bytes(Tile::kChunks * kChunkRows);
  return end;
}

// For callers that ask for no depth: as deep as fits in 99 KB, the least a GPU of sm_80 and newer
// gives a CTA, with the largest chunks; two at least, eight at most.
template <typename Tile, typename Format>
int default_stages(bool bulk) {
  if (!bulk) return Tile::kXStages;
  const ChunkRings<Tile> rings(1, Format::kMaxBytes);
  const int fit = (99 * 1024 - rings.chunk(0)) / (Tile::kChunks * rings.stride);
  return fit < 2 ? 2 : fit < 8 ? fit : 8;
}

template <typename T, typename Tile, bool BULK, typename Format>
void launch_chunk_gemm(const ChunkGemmParams& p, const Format& format, ChunkConfig config,
                       void* stream) {
  if (!BULK || config.stages == 0) config.stages = default_stages<Tile, Format>(BULK);
  const int64_t m_tiles = ceil_div(p.M, Tile::kRows);
  LaunchOptions options;
  options.dynamic_shared_bytes = chunk_shared_bytes<Tile>(format, config.stages);
  options.cluster_size = BULK ? config.split : 1;
  options.programmatic = BULK;
  launch_with(options, Format::kOp, chunk_gemm_kernel<Format, T, Tile, BULK>,
              m_tiles * ceil_div(p.N, Tile::kChunks * kChunkRows) * config.split, Tile::kThreads,
              stream, p, format, config, ceil_div(p.K, kChunkColumns),
              static_cast<unsigned>(m_tiles));
  if (!BULK && config.split > 1)
    launch(Format::kOp, chunk_gemm_add_slices_kernel<T>, ceil_div(p.M * p.N, 256), 256, stream, p,
           config);
}

// f(tile) for the tile of `rows` rows of x: 8, 16, 32 and 64, and 128 if the format serves it.
template <typename Format, typename F>
auto with_tile(int rows, F&& f) {
  if constexpr (kServesWide<Format>) {
    if (rows == 128) return f(WideTile());
  }
  if (rows == 8) return f(NarrowTile<1>());
  if (rows == 16) return f(NarrowTile<2>());
  if (rows == 32) return f(NarrowTile<4>());
  return f(NarrowTile<8>());
}

// One instance per tile and way of copying.
template <typename T, typename Format>
void chunk_gemm(const ChunkGemmParams& p, const Format& format, const ChunkConfig& config,
                void* stream) {
  with_tile<Format>(config.rows, [&](auto tile) {
    using Tile = decltype(tile);
    if (config.bulk)
      launch_chunk_gemm<T, Tile, true>(p, format, config, stream);
    else
      launch_chunk_gemm<T, Tile, false>(p, format, config, stream);
  });
}

}  // namespace llmkern::cuda
