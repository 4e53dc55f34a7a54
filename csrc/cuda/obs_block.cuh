// The column loop of obs_quantize and obs_prune over one block of up to 128 columns: for each
// column k in order
//   v = w_k + sum_{j<k} (w_j - q_j) U_jk,  q_k = Q(v), 0 if pruned,  loss += ((v - q_k) d_k)^2
// The sum over earlier blocks is already in `work` (llmkern/ops/_obs_blocks.py). Rows are
// independent.
//
// Bound by latency: 128 dependent columns. A CTA owns 32 rows and keeps their columns and the
// block's U in shared memory. Warp 0, a lane per row, takes 8 columns (a chunk) at a time through
// the chain in registers, pushing each error onto the rest of the chunk and onto the next chunk,
// which it holds as well. Meanwhile warps 1 to 3 add the errors of the chunk before to all columns
// behind those two. One barrier per chunk; every sum has a fixed order.
//
// Policies are template parameters: what Q rounds to, and where the mask comes from. Divisions are
// IEEE and ties go as the reference says, so that codes equal the reference's up to the order of
// sums.
//
// Not yet run on a GPU: tested in the emulator (csrc/emu) and compiled ahead of time only.
#pragma once

#include <type_traits>

#include "cuda/common/launch.h"
#include "cuda/kernels.h"

namespace llmkern::cuda {

enum class ObsGrid { kNone, kInteger, kBook };
enum class ObsMask {
  kNone,
  kGiven,
  kOfEvery
};  // kOfEvery: the best `kept` of every `size` columns

constexpr int kObsRows = 32;  // of w per CTA: the lanes of warp 0
constexpr int kObsThreads = 128;
constexpr int kObsBlock = 128;  // columns; BLOCK_SIZE of llmkern/reference/obs_prune.py
constexpr int kChunk = 8;       // columns; a multiple of `size` of them if there is one
constexpr int kByteStride = kObsBlock + 4;

// Rows end on an odd length: loading (lanes along columns) and computing (lanes along rows) are
// both free of bank conflicts.
struct ObsShared {
  float work[kObsBlock][kObsRows + 1];   // updated weights, then the values chosen for them
  float error[kObsBlock][kObsRows + 1];  // original weights, then w - w_hat
  alignas(16) float U[8 * 8 * 17 * 8];   // see u_row
  float d[kObsBlock];
  int32_t group[kObsBlock];
  uint8_t codes[kObsRows][kByteStride];
  uint8_t mask[kObsRows][kByteStride];
};

// U in shared memory: rows in eights, row j from column j / 8 * 8 on. At what this returns plus the
// column.
__device__ __forceinline__ int u_row(int j) {
  const int eight = j / 8;
  return 1024 * eight - 32 * eight * (eight - 1) + j % 8 * (kObsBlock - 8 * eight) - 8 * eight;
}

__device__ __forceinline__ float round_to_integer(float v, float scale, float zero, float top,
                                                  float& code) {
  code = fminf(fmaxf(rintf(__fdiv_rn(v, scale)) + zero, 0.0f), top);
  // Not contracted with a later subtraction: this is the value that gets stored.
  return __fmul_rn(scale, code - zero);
}

struct RowBook {
  float entry[16];
  // The nearest entry, a tie going to the smaller; its rank is the number of middles below x.
  __device__ __forceinline__ float round(float v, float scale, float& rank) const {
    const float x = __fdiv_rn(v, scale);
    float nearest = entry[0];
    rank = 0.0f;
#pragma unroll
    for (int i = 0; i < 15; i++) {
      const bool above = __fadd_rn(entry[i], entry[i + 1]) * 0.5f < x;
      rank += above ? 1.0f : 0.0f;
      nearest = above ? entry[i + 1] : nearest;
    }
    return __fmul_rn(scale, nearest);
  }
};

// What warp 0 keeps between chunks, for the row of its lane.
struct ObsRow {
  float v[kChunk];      // the chunk's weights, updated by all errors before it
  float e[kChunk];      // the errors of the chunk before
  float scale[kChunk];  // of the chunk's columns
  float zero[kChunk];
  float loss;
};

// Bit i of the result: column i of the group of `size` that starts at register START is kept. The
// cost of pruning is (w' d)^2 with w' the weights reached if the group is left as it is; a tie goes
// to the lower column.
template <int START>
__device__ __forceinline__ unsigned choose_of_every(const ObsShared& s, const ObsRow& row,
                                                    const float (&w)[kChunk], int first, int size,
                                                    int kept) {
  constexpr int kMost = kChunk - START;
  float reached[kMost], cost[kMost];
#pragma unroll
  for (int i = 0; i < kMost; i++) {
    if (i >= size) break;
    reached[i] = row.v[START + i];
#pragma unroll
    for (int j = 0; j < i; j++)
      reached[i] += (w[START + j] - reached[j]) * s.U[u_row(first + START + j) + first + START + i];
    const float scaled = __fmul_rn(reached[i], s.d[first + START + i]);
    cost[i] = __fmul_rn(scaled, scaled);
  }
  unsigned keep = 0;
#pragma unroll
  for (int i = 0; i < kMost; i++) {
    if (i >= size) break;
    int cheaper = 0;
#pragma unroll
    for (int j = 0; j < kMost; j++) {
      if (j >= size) break;
      if (j != i) cheaper += cost[j] < cost[i] || (cost[j] == cost[i] && j < i);
    }
    keep |= (cheaper >= size - kept ? 1u : 0u) << i;
  }
  return keep;
}

// Scales and zeros of the chunk at `first`, loaded where the group changes.
template <ObsGrid GRID>
__device__ __forceinline__ void load_grids(const ObsBlockParams& p, const ObsShared& s,
                                           int64_t row_groups, int first, int width,
                                           float (&scale)[kChunk], float (&zero)[kChunk]) {
  if constexpr (GRID != ObsGrid::kNone) {
#pragma unroll
    for (int i = 0; i < kChunk; i++) {
      if (i >= width) break;
      const int g = s.group[first + i];
      if (i > 0 && g == s.group[first + i - 1]) {
        scale[i] = scale[i > 0 ? i - 1 : 0];
        zero[i] = zero[i > 0 ? i - 1 : 0];
      } else {
        scale[i] = p.scales[row_groups + g];
        zero[i] = GRID == ObsGrid::kInteger ? p.zeros[row_groups + g] : 0.0f;
      }
    }
  }
}

// Warp 0's part: `width` columns from `first` on; `next` of them follow in the next chunk. Leaves
// that one's weights and grids in `row`.
template <ObsGrid GRID, ObsMask MASK>
__device__ __forceinline__ void walk_chunk(const ObsBlockParams& p, ObsShared& s, ObsRow& row,
                                           RowBook& book, int64_t expert, int64_t n, int first,
                                           int width, int next, int before) {
  const int lane = threadIdx.x;
  const float top = static_cast<float>((1 << p.bits) - 1);
  float w[kChunk], e[kChunk] = {}, ahead[kChunk] = {}, scale[kChunk] = {}, zero[kChunk] = {};
  load_grids<GRID>(p, s, (expert * p.N + n) * p.groups, first + width, next, scale, zero);
#pragma unroll
  for (int i = 0; i < kChunk; i++) {
    w[i] = i < width ? s.error[first + i][lane] : 0.0f;
    ahead[i] = i < next ? s.work[first + width + i][lane] : 0.0f;
  }
  // The errors of the chunk before reach the next one here, behind this chunk's chain.
#pragma unroll
  for (int j = 0; j < kChunk; j++) {
    if (j >= before) break;
    const int u = u_row(first - before + j) + first + width;
#pragma unroll
    for (int i = 0; i < kChunk; i++)
      if (i < next) ahead[i] += row.e[j] * s.U[u + i];
  }

  unsigned keep = 0;
  const auto column = [&](auto index) {
    constexpr int i = decltype(index)::value;
    if (i >= width) return;
    const int k = first + i;
    bool kept = true;
    if constexpr (MASK == ObsMask::kGiven) kept = s.mask[lane][k] != 0;
    if constexpr (MASK == ObsMask::kOfEvery) {
      if (i % p.size == 0) keep = choose_of_every<i>(s, row, w, first, p.size, p.kept);
      kept = keep >> i % p.size & 1;
      s.mask[lane][k] = kept;
    }
    const float v = row.v[i];
    float value = kept ? v : 0.0f;
    [[maybe_unused]] float code = 0.0f;
    if constexpr (GRID == ObsGrid::kInteger)
      value = round_to_integer(value, row.scale[i], row.zero[i], top, code);
    if constexpr (GRID == ObsGrid::kBook) {
      const int g = s.group[k];
      if (k == 0 || (p.book_group && g != s.group[k - 1])) {
        const float* from = p.codebook + expert * p.book_expert + n * p.book_row + g * p.book_group;
#pragma unroll
        for (int entry = 0; entry < 16; entry++) book.entry[entry] = from[entry];
      }
      value = book.round(value, row.scale[i], code);
    }
    if (!kept) value = 0.0f;
    if constexpr (GRID != ObsGrid::kNone) s.codes[lane][k] = static_cast<uint8_t>(code);
    e[i] = w[i] - value;
    const float scaled = (v - value) * s.d[k];
    row.loss += scaled * scaled;
    s.work[k][lane] = value;
    s.error[k][lane] = e[i];
    const int u = u_row(k) + first;
#pragma unroll
    for (int later = i + 1; later < kChunk; later++)
      if (later < width) row.v[later] += e[i] * s.U[u + later];
#pragma unroll
    for (int later = 0; later < kChunk; later++)
      if (later < next) ahead[later] += e[i] * s.U[u + width + later];
  };
  column(std::integral_constant<int, 0>());
  column(std::integral_constant<int, 1>());
  column(std::integral_constant<int, 2>());
  column(std::integral_constant<int, 3>());
  column(std::integral_constant<int, 4>());
  column(std::integral_constant<int, 5>());
  column(std::integral_constant<int, 6>());
  column(std::integral_constant<int, 7>());

#pragma unroll
  for (int i = 0; i < kChunk; i++) {
    row.v[i] = ahead[i];
    row.e[i] = e[i];
    row.scale[i] = scale[i];
    row.zero[i] = zero[i];
  }
}

// The part of warps 1 to 3: columns `from`..`columns`-1 += the errors of `width` columns at
// `first`.
__device__ __forceinline__ void push_errors(ObsShared& s, int first, int width, int from,
                                            int columns) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float e[kChunk];
#pragma unroll
  for (int j = 0; j < kChunk; j++) e[j] = j < width ? s.error[first + j][lane] : 0.0f;
  for (int k = from / 4 * 4 + 4 * (warp - 1); k < columns; k += 4 * (kObsThreads / 32 - 1)) {
    float sum[4];
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i] = s.work[k + i][lane];
#pragma unroll
    for (int j = 0; j < kChunk; j++) {
      if (j >= width) break;
      const float4 u = *reinterpret_cast<const float4*>(&s.U[u_row(first + j) + k]);
      sum[0] += e[j] * u.x;
      sum[1] += e[j] * u.y;
      sum[2] += e[j] * u.z;
      sum[3] += e[j] * u.w;
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (k + i >= from && k + i < columns) s.work[k + i][lane] = sum[i];
  }
}

// Fills shared memory: columns and U beyond the block are zero.
template <ObsGrid GRID, ObsMask MASK>
__device__ __forceinline__ void load_block(const ObsBlockParams& p, ObsShared& s, int64_t expert,
                                           int64_t first_n, int columns) {
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  for (int r = warp; r < kObsRows; r += kObsThreads / 32) {
    const int64_t n = expert * p.N + first_n + r;
    const bool live = first_n + r < p.N;
    for (int c = lane; c < kObsBlock; c += 32) {
      const bool valid = live && c < columns;
      s.work[c][r] = valid ? p.work[n * p.work_stride + p.work_first + c] : 0.0f;
      s.error[c][r] = valid ? p.w[n * p.K + p.first + c] : 0.0f;
      if constexpr (MASK == ObsMask::kGiven)
        s.mask[r][c] = valid ? p.mask[n * p.K + p.first + c] : uint8_t{1};
    }
  }
  for (int j = warp; j < kObsBlock; j += kObsThreads / 32) {
    const float* from = p.U + (expert * p.K + p.first + j) * p.K + p.first;
    for (int c = j / 8 * 8 + lane; c < kObsBlock; c += 32)
      s.U[u_row(j) + c] = j < c && c < columns ? from[c] : 0.0f;
  }
  if (tid < columns) {
    s.d[tid] = p.d[expert * p.K + p.first + tid];
    if constexpr (GRID != ObsGrid::kNone) s.group[tid] = p.g_idx[expert * p.K + p.first + tid];
  }
}

template <ObsGrid GRID, ObsMask MASK>
__device__ __forceinline__ void store_block(const ObsBlockParams& p, const ObsShared& s,
                                            int64_t expert, int64_t first_n, int columns) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int r = warp; r < kObsRows && first_n + r < p.N; r += kObsThreads / 32) {
    const int64_t n = expert * p.N + first_n + r;
    for (int c = lane; c < columns; c += 32) {
      p.work[n * p.work_stride + p.work_first + c] = s.work[c][r];
      p.error[n * p.error_stride + c] = s.error[c][r];
      if constexpr (GRID != ObsGrid::kNone) p.codes[n * p.K + p.first + c] = s.codes[r][c];
      if constexpr (MASK == ObsMask::kOfEvery) p.mask[n * p.K + p.first + c] = s.mask[r][c];
    }
  }
}

template <ObsGrid GRID, ObsMask MASK>
__global__ void __launch_bounds__(kObsThreads)
    obs_block_kernel(const __grid_constant__ ObsBlockParams p, const unsigned row_tiles) {
  LLMKERN_DYNAMIC_SHARED(unsigned char, smem);
  ObsShared& s = *reinterpret_cast<ObsShared*>(smem);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t expert = blockIdx.x / row_tiles;
  const int64_t first_n = int64_t{blockIdx.x % row_tiles} * kObsRows;
  const int columns = static_cast<int>(p.last - p.first);
  const int chunk = MASK == ObsMask::kOfEvery ? kChunk / p.size * p.size : kChunk;
  // Lanes beyond the last row walk a row of zeros on the last row's grid.
  const int64_t n = min(first_n + lane, p.N - 1);
  load_block<GRID, MASK>(p, s, expert, first_n, columns);
  __syncthreads();

  ObsRow row = {};
  RowBook book = {};
  if (warp == 0) {
#pragma unroll
    for (int i = 0; i < kChunk; i++) row.v[i] = i < min(chunk, columns) ? s.work[i][lane] : 0.0f;
    load_grids<GRID>(p, s, (expert * p.N + n) * p.groups, 0, min(chunk, columns), row.scale,
                     row.zero);
  }
  for (int first = 0; first < columns; first += chunk) {
    const int width = min(chunk, columns - first), next = min(chunk, columns - first - width);
    if (warp == 0) {
      walk_chunk<GRID, MASK>(p, s, row, book, expert, n, first, width, next, first > 0 ? chunk : 0);
    } else if (first > 0) {
      push_errors(s, first - chunk, chunk, first + 2 * chunk, columns);
    }
    __syncthreads();
  }
  if (warp == 0 && p.loss && first_n + lane < p.N)
    p.loss[expert * p.N + first_n + lane] += row.loss;
  store_block<GRID, MASK>(p, s, expert, first_n, columns);
}

template <ObsGrid GRID, ObsMask MASK>
void launch_obs_block(const ObsBlockParams& p, void* stream) {
  const int64_t row_tiles = ceil_div(p.N, kObsRows);
  LaunchOptions options;
  options.dynamic_shared_bytes = sizeof(ObsShared);
  launch_with(options, "obs_block", obs_block_kernel<GRID, MASK>, p.E * row_tiles, kObsThreads,
              stream, p, static_cast<unsigned>(row_tiles));
}

// Those of obs_prune: nothing to round to, or a mask that the kernel chooses (obs_prune.cu).
void obs_prune_block(const ObsBlockParams& p, void* stream);

}  // namespace llmkern::cuda
