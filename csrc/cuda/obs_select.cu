// Which weights of a block of columns obs_prune removes: the `removed` lowest costs (w' d)^2 of the
// N x columns of an expert, or of each row; ties by column, then by row, exactly.
//
// Of each row: a warp ranks its up to 128 costs against each other. Of a whole block: a radix
// select. Costs are not negative, so their bits order like them; keys are written column by column,
// the order of ties. Three passes count 11, 10 and 10 bits and give the key T of the first cost
// that is kept; the keys below T go, and of those equal to T the first so many: each CTA counts
// them in its stretch, then marks its own. Counts are integers, so that the order of the atomic
// additions does not matter. Bound by latency: five small grids over data that stay in L2.
//
// Not yet run on a GPU: tested in the emulator (csrc/emu) and compiled ahead of time only.

#include "cuda/common/launch.h"
#include "cuda/kernels.h"

namespace llmkern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTileRows = 32;
constexpr int kColumns = 128;  // at most
constexpr int kPerThread = 16;
constexpr int kStretch = kThreads * kPerThread;  // keys per CTA
constexpr int kRowWarps = 4;
constexpr int kDigits = 3;

// Digit i is bits shift(i) + log2(bins(i)) - 1 .. shift(i); the sign bit is not one of them.
__host__ __device__ constexpr int shift(int digit) { return 20 - 10 * digit; }
__host__ __device__ constexpr int bins(int digit) { return digit == 0 ? 2048 : 1024; }
__host__ __device__ constexpr int bins_before(int digit) {
  return digit == 0 ? 0 : 1024 + 1024 * digit;
}

__device__ __forceinline__ uint32_t cost_key(float reached, float d) {
  const float scaled = __fmul_rn(reached, d);
  return __float_as_uint(__fmul_rn(scaled, scaled)) & 0x7fffffffu;
}

// The sum of the values of the threads before this one. All threads call it.
__device__ __forceinline__ uint32_t sum_before(uint32_t value, uint32_t (&scratch)[kThreads]) {
  const int tid = threadIdx.x;
  uint32_t sum = value;
  for (int step = 1; step < kThreads; step *= 2) {
    scratch[tid] = sum;
    __syncthreads();
    if (tid >= step) sum += scratch[tid - step];
    __syncthreads();
  }
  return sum - value;
}

// Where the key of rank `rank` lies, as far as the digits before DIGITS say.
struct Prefix {
  uint32_t key;   // those digits, in place
  uint32_t rank;  // among the keys that share them
};

// All threads call it.
template <int DIGITS>
__device__ __forceinline__ Prefix find_prefix(const uint32_t* counts, uint32_t rank,
                                              uint32_t (&scratch)[kThreads], Prefix& found) {
  Prefix prefix = {0, rank};
#pragma unroll
  for (int digit = 0; digit < DIGITS; digit++) {
    const int mine = bins(digit) / kThreads, first = threadIdx.x * mine;
    const uint32_t* from = counts + bins_before(digit) + first;
    uint32_t sum = 0;
    for (int i = 0; i < mine; i++) sum += from[i];
    uint32_t before = sum_before(sum, scratch);
    if (before <= prefix.rank && prefix.rank < before + sum) {
      int bin = 0;
      while (before + from[bin] <= prefix.rank) before += from[bin++];
      found = {prefix.key | static_cast<uint32_t>(first + bin) << shift(digit),
               prefix.rank - before};
    }
    __syncthreads();
    prefix = found;
    __syncthreads();
  }
  return prefix;
}

// Adds one to the CTA's count of the key's digit.
template <int DIGIT>
__device__ __forceinline__ void count_digit(uint32_t* histogram, uint32_t key) {
  atomicAdd(&histogram[key >> shift(DIGIT) & (bins(DIGIT) - 1)], 1u);
}

template <int DIGIT>
__device__ __forceinline__ void clear_counts(uint32_t* histogram) {
  for (int bin = threadIdx.x; bin < bins(DIGIT); bin += kThreads) histogram[bin] = 0;
  __syncthreads();
}

template <int DIGIT>
__device__ __forceinline__ void add_counts(const uint32_t* histogram, uint32_t* counts) {
  __syncthreads();
  for (int bin = threadIdx.x; bin < bins(DIGIT); bin += kThreads)
    if (histogram[bin]) atomicAdd(&counts[bins_before(DIGIT) + bin], histogram[bin]);
}

// Keys, column by column, and the counts of their first digit. A CTA takes 32 rows.
__global__ void __launch_bounds__(kThreads)
    obs_select_keys_kernel(const ObsSelectParams p, const unsigned row_tiles) {
  LLMKERN_SHARED(uint32_t, keys, [kTileRows][kColumns + 1]);
  LLMKERN_SHARED(uint32_t, histogram, [bins(0)]);
  const int64_t expert = blockIdx.x / row_tiles;
  const int64_t first_n = int64_t{blockIdx.x % row_tiles} * kTileRows;
  const int columns = static_cast<int>(p.columns);
  const int rows = static_cast<int>(min(p.N - first_n, int64_t{kTileRows}));
  clear_counts<0>(histogram);
  const float* reached = p.reached + (expert * p.N + first_n) * columns;
  for (int i = threadIdx.x; i < rows * columns; i += kThreads) {
    const int c = i % columns;
    const uint32_t key = cost_key(reached[i], p.d[expert * p.d_stride + c]);
    keys[i / columns][c] = key;
    count_digit<0>(histogram, key);
  }
  add_counts<0>(histogram, p.counts + expert * p.counts_stride);
  uint32_t* to = p.keys + expert * p.N * columns + first_n;
  for (int i = threadIdx.x; i < kTileRows * columns; i += kThreads)
    if (i % kTileRows < rows)
      to[i / kTileRows * p.N + i % kTileRows] = keys[i % kTileRows][i / kTileRows];
}

// A CTA's stretch of an expert's keys.
struct Stretch {
  int64_t expert, first;
  int size;
  const uint32_t* keys;
  uint32_t* counts;
};

__device__ __forceinline__ Stretch stretch_of(const ObsSelectParams& p, unsigned stretches) {
  const int64_t expert = blockIdx.x / stretches, all = p.N * p.columns;
  const int64_t first = int64_t{blockIdx.x % stretches} * kStretch;
  return {expert, first, static_cast<int>(min(all - first, int64_t{kStretch})),
          p.keys + expert * all + first, p.counts + expert * p.counts_stride};
}

// The counts of a later digit among the keys that share the digits before it with T.
template <int DIGIT>
__global__ void __launch_bounds__(kThreads)
    obs_select_digit_kernel(const ObsSelectParams p, const unsigned stretches) {
  LLMKERN_SHARED(uint32_t, scratch, [kThreads]);
  LLMKERN_SHARED(Prefix, found, [1]);
  LLMKERN_SHARED(uint32_t, histogram, [bins(DIGIT)]);
  const Stretch mine = stretch_of(p, stretches);
  clear_counts<DIGIT>(histogram);
  const uint32_t rank = static_cast<uint32_t>(p.removed);
  const Prefix prefix = find_prefix<DIGIT>(mine.counts, rank, scratch, found[0]);
  for (int i = threadIdx.x; i < mine.size; i += kThreads) {
    const uint32_t key = mine.keys[i];
    if ((key ^ prefix.key) >> shift(DIGIT - 1) == 0) count_digit<DIGIT>(histogram, key);
  }
  add_counts<DIGIT>(histogram, mine.counts);
}

// How many of a stretch's keys are T.
__global__ void __launch_bounds__(kThreads)
    obs_select_ties_kernel(const ObsSelectParams p, const unsigned stretches) {
  LLMKERN_SHARED(uint32_t, scratch, [kThreads]);
  LLMKERN_SHARED(Prefix, found, [1]);
  const Stretch mine = stretch_of(p, stretches);
  const uint32_t rank = static_cast<uint32_t>(p.removed);
  const Prefix prefix = find_prefix<kDigits>(mine.counts, rank, scratch, found[0]);
  uint32_t ties = 0;
  for (int i = threadIdx.x; i < mine.size; i += kThreads) ties += mine.keys[i] == prefix.key;
  const uint32_t before = sum_before(ties, scratch);
  if (threadIdx.x == kThreads - 1)
    mine.counts[bins_before(kDigits) + blockIdx.x % stretches] = before + ties;
}

// Writes the mask of a stretch. A thread takes kPerThread keys in a row.
__global__ void __launch_bounds__(kThreads)
    obs_select_mask_kernel(const ObsSelectParams p, const unsigned stretches) {
  LLMKERN_SHARED(uint32_t, scratch, [kThreads]);
  LLMKERN_SHARED(Prefix, found, [1]);
  const Stretch mine = stretch_of(p, stretches);
  const int tid = threadIdx.x, stretch = blockIdx.x % stretches;
  const uint32_t rank = static_cast<uint32_t>(p.removed);
  const Prefix prefix = find_prefix<kDigits>(mine.counts, rank, scratch, found[0]);
  uint32_t earlier = 0;  // ties in the stretches before, this thread's share
  for (int i = tid; i < stretch; i += kThreads) earlier += mine.counts[bins_before(kDigits) + i];
  const uint32_t shares = sum_before(earlier, scratch);
  if (tid == kThreads - 1) scratch[0] = shares + earlier;
  __syncthreads();
  const uint32_t all_earlier = scratch[0];
  __syncthreads();
  const int first = tid * kPerThread, end = min(first + kPerThread, mine.size);
  uint32_t ties = 0;
  for (int i = first; i < end; i++) ties += mine.keys[i] == prefix.key;
  uint32_t before = all_earlier + sum_before(ties, scratch);
  for (int i = first; i < end; i++) {
    const uint32_t key = mine.keys[i];
    bool keep = key > prefix.key;
    if (key == prefix.key) keep = before++ >= prefix.rank;
    const int64_t at = mine.first + i, n = mine.expert * p.N + at % p.N;
    p.mask[n * p.mask_stride + at / p.N] = keep;
  }
}

// Of each row: a warp per row, four columns per lane.
__global__ void __launch_bounds__(kRowWarps * 32) obs_select_rows_kernel(const ObsSelectParams p) {
  constexpr int kPerLane = kColumns / 32;
  const int lane = threadIdx.x % 32, columns = static_cast<int>(p.columns);
  const int64_t n = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / 32;
  if (n >= p.E * p.N) return;
  uint32_t key[kPerLane];
  int cheaper[kPerLane] = {};
#pragma unroll
  for (int i = 0; i < kPerLane; i++) {
    const int c = lane + 32 * i;
    key[i] = c < columns ? cost_key(p.reached[n * columns + c], p.d[n / p.N * p.d_stride + c])
                         : 0xffffffffu;
  }
#pragma unroll
  for (int from = 0; from < kPerLane; from++)
    for (int source = 0; source < 32; source++) {
      const uint32_t other = __shfl_sync(0xffffffffu, key[from], source);
      const int j = source + 32 * from;
#pragma unroll
      for (int i = 0; i < kPerLane; i++)
        cheaper[i] += other < key[i] || (other == key[i] && j < lane + 32 * i);
    }
#pragma unroll
  for (int i = 0; i < kPerLane; i++)
    if (lane + 32 * i < columns)
      p.mask[n * p.mask_stride + lane + 32 * i] = cheaper[i] >= p.removed;
}

}  // namespace

void obs_select(const ObsSelectParams& p, void* stream) {
  if (p.per_row) {
    launch("obs_select", obs_select_rows_kernel, ceil_div(p.E * p.N, kRowWarps), kRowWarps * 32,
           stream, p);
    return;
  }
  const int64_t row_tiles = ceil_div(p.N, kTileRows);
  const int64_t stretches = ceil_div(p.N * p.columns, kStretch);
  const auto step = [&](auto* kernel, int64_t ctas) {
    launch("obs_select", kernel, p.E * ctas, kThreads, stream, p, static_cast<unsigned>(ctas));
  };
  step(obs_select_keys_kernel, row_tiles);
  step(obs_select_digit_kernel<1>, stretches);
  step(obs_select_digit_kernel<2>, stretches);
  step(obs_select_ties_kernel, stretches);
  step(obs_select_mask_kernel, stretches);
}

int64_t obs_select_counts(int64_t N, int64_t columns) {
  return bins_before(kDigits) + ceil_div(N * columns, kStretch);
}

}  // namespace llmkern::cuda
