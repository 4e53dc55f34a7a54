// out[m, n] = sum_k x[m, k] * scales[n, g] * (codes[n, k] - zeros[n, g]) + bias[n]
//
// Integer dot products do 4 (VNNI) or 2 multiplications where a float FMA does one, so x is
// written, chunk by chunk of K (at most 128 columns, inside a group), as D signed 8-bit digits of a
// fixed-point number: the largest |x| of the row's chunk fills 8 * D - 1 bits. D = 4 for float32 x
// (every bit of an element down to 2^-30 of the largest is kept), 3 for 16-bit x (down to 2^-22, as
// a float32 accumulator would keep). Inside a chunk the sums are exact; a chunk's sum enters the
// float32 accumulator once, times scale, in ascending k. So a row's result depends on nothing but
// that row and the weight: not on M, on its neighbours, on the number of threads or on the
// instruction set. The exceptions, as exact in the products, sum in float32: bfloat16 x on AMX from
// kBf16Rows rows on (w4a16_amx_bf16.h), and by fast bfloat16 dot products (w4a16_bf16.h).
//
// A row's chunk with a NaN or an Inf makes the row's outputs NaN.
#include "digits.h"
#include "int4_dot.h"
#include "kernels.h"
#include "w4a16_amx_bf16.h"
#include "w4a16_amx_int8.h"
#include "w4a16_bf16.h"
#include "w4a16_block.h"

namespace llmkern::LLMKERN_ISA {
namespace {

// Rows of x that pass over a block's tiles together: their accumulators stay in the L2 cache.
constexpr int64_t kPanel = 192;
// x of some rows as digits. Tiles of kRows<D> rows (fewer at the end) are stored one after another.
struct Digits {
  int32_t* x;       // tile: [K / 4][rows][D], four columns per dword
  int32_t* x_sums;  // tile: [chunks][rows][D], sum of a chunk's digits, in the low 16 bits
  float* scales;    // [rows][chunks], a power of two; NaN if the chunk is not finite
  int64_t rows, K, columns, chunks;
};

// Row m of x into its digits.
template <int D>
void split(const W4A16GemmParams& p, int64_t m0, const Digits& digits, int64_t m) {
  const int64_t n = digits.columns, tile = m / kRows<D> * kRows<D>;
  const int64_t rows = min_of(kRows<D>, digits.rows - tile), at = (m - tile) * D;
  const RowScale row = D == 1 ? row_scale(p, m0 + m, n) : RowScale{};
  for (int64_t c = 0; c < digits.chunks; ++c) {
    int32_t* out = digits.x + (tile * digits.K + c * n * rows) / 4 * D + at;
    int32_t* sums = digits.x_sums + (tile * digits.chunks + c * rows) * D + at;
    alignas(64) float x[kMaxChunk];
    ChunkDigits<D> chunk;
    to_float(p.x, (m0 + m) * p.x_stride + c * n, p.dtype, n, x);
    split_chunk(x, n, row, chunk);
    digits.scales[m * digits.chunks + c] = chunk.scale;
    for (int d = 0; d < D; ++d) {
      int32_t sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += chunk.digit[d][i];
      for (int64_t q = 0; q < n / 4; ++q) memcpy(out + q * rows * D + d, chunk.digit[d] + 4 * q, 4);
      sums[d] = sum & 0xffff;
    }
  }
}

// acc += scales * (the digits' sums put together), for one row of x.
template <int D>
inline void accumulate(const int32_t* sums, const float* scales, float x_scale, float* acc) {
  for (int64_t n = 0; n < kBlock; ++n) {
    float sum = float(D == 1 ? sums[n] : sums[n] + 256 * sums[kBlock + n]);
    if (D == 3) sum = fmaf(float(sums[2 * kBlock + n]), 65536.f, sum);
    if (D == 4) sum = fmaf(float(sums[2 * kBlock + n] + 256 * sums[3 * kBlock + n]), 65536.f, sum);
    acc[n] = fmaf(scales[n] * x_scale, sum, acc[n]);
  }
}

// One tile of the weight times R rows of x, from `row` on.
template <int R, int D>
inline void multiply_rows(const Tile& tile, const Digits& digits, int64_t row, int64_t c,
                          float* acc) {
  alignas(64) int32_t sums[R * D * kBlock];
  dot_tile<R, D>(tile, digits.columns / 4,
                 digits.x + (row * digits.K + c * digits.columns * R) / 4 * D,
                 digits.x_sums + (row * digits.chunks + c * R) * D, sums);
  for (int r = 0; r < R; ++r)
    accumulate<D>(sums + r * D * kBlock, tile.scales, digits.scales[(row + r) * digits.chunks + c],
                  acc + r * kBlock);
}

template <int D>
inline void multiply_tile(const Tile& tile, const Digits& digits, int64_t row, int64_t rows,
                          int64_t c, float* acc) {
  constexpr int kMost = kRows<D>;
  if (rows == 1) return multiply_rows<1, D>(tile, digits, row, c, acc);
  if constexpr (kMost >= 2)
    if (rows == 2) return multiply_rows<2, D>(tile, digits, row, c, acc);
  if constexpr (kMost >= 3)
    if (rows == 3) return multiply_rows<3, D>(tile, digits, row, c, acc);
  if constexpr (kMost >= 4)
    if (rows == 4) return multiply_rows<4, D>(tile, digits, row, c, acc);
  if constexpr (kMost >= 5)
    if (rows == 5) return multiply_rows<5, D>(tile, digits, row, c, acc);
  if constexpr (kMost >= 6) multiply_rows<6, D>(tile, digits, row, c, acc);
}

// Columns n0 .. n0 + 63 of the output for rows `first` .. `last` of the digits, which start at row
// m0 of x.
template <int D>
void multiply_block(const W4A16GemmParams& p, const Digits& digits, int64_t m0, int64_t n0,
                    int64_t first, int64_t last) {
  alignas(64) float acc[kPanel * kBlock];
  memset(acc, 0, (last - first) * kBlock * sizeof(float));
  Tile tile;
  start_block(p.w, n0, tile);
  for (int64_t c = 0; c < digits.chunks; ++c) {
    load_tile(p.w, n0, c * digits.columns, digits.columns, tile);
    for (int64_t row = first; row < last; row += kRows<D>)
      multiply_tile<D>(tile, digits, row, min_of(kRows<D>, last - row), c,
                       acc + (row - first) * kBlock);
  }
  store_block(p, acc, m0 + first, last - first, n0);
}

#ifdef __AVX512VNNI__
// Columns n0 .. n0 + 127 of the only row.
template <int D>
void multiply_two_blocks(const W4A16GemmParams& p, const Digits& digits, int64_t n0) {
  alignas(64) float acc[2][kBlock] = {};
  alignas(64) int32_t sums[2][D * kBlock];
  Tile tiles[2];
  for (int t = 0; t < 2; ++t) start_block(p.w, n0 + t * kBlock, tiles[t]);
  for (int64_t c = 0; c < digits.chunks; ++c) {
    for (int t = 0; t < 2; ++t)
      load_tile(p.w, n0 + t * kBlock, c * digits.columns, digits.columns, tiles[t]);
    dot_two_tiles<D>(tiles, digits.columns / 4, digits.x + c * digits.columns / 4 * D,
                     digits.x_sums + c * D, sums);
    for (int t = 0; t < 2; ++t) accumulate<D>(sums[t], tiles[t].scales, digits.scales[c], acc[t]);
  }
  for (int t = 0; t < 2; ++t) store_block(p, acc[t], 0, 1, n0 + t * kBlock);
}
#endif

template <int D>
void multiply(const W4A16GemmParams& p) {
  const int64_t N = p.w.N, K = p.w.K, columns = chunk_columns(p.w.group_size);
  const int64_t blocks = ceil_div(N, kBlock);
  // Rows at a time, whole panels unless M is less.
  const int64_t panels_at_once = kWorkspaceBytes / (K * D * kPanel + 1) + 1;
  const int64_t step = min_of(p.M, panels_at_once * kPanel);
  const int64_t chunks = K / columns, sums_at = step * K / 4 * D,
                scales_at = sums_at + step * chunks * D;
  const Buffer<int32_t> buffer(scales_at + step * chunks);
  int32_t* x = buffer.data();
  static_assert(kPanel % kRows<D> == 0, "panels start with a tile of rows");
  for (int64_t m0 = 0; m0 < p.M; m0 += step) {
    const Digits digits = {
        x,       x + sums_at, reinterpret_cast<float*>(x + scales_at), min_of(step, p.M - m0), K,
        columns, chunks};
    const int64_t panels = (digits.rows + kPanel - 1) / kPanel;
    // A few rows are split by one thread: every barrier waits for the slowest.
#pragma omp parallel for schedule(static) if (digits.rows * K >= kParallelSplit)
    for (int64_t m = 0; m < digits.rows; ++m) split<D>(p, m0, digits, m);
#ifdef __AVX512VNNI__
    if (p.M == 1 && N % (2 * kBlock) == 0) {
#pragma omp parallel for schedule(dynamic) if (N * K >= kParallelWork)
      for (int64_t n = 0; n < N; n += 2 * kBlock) multiply_two_blocks<D>(p, digits, n);
      return;
    }
#endif
#pragma omp parallel for schedule(dynamic) if (digits.rows * N * K >= kParallelWork)
    for (int64_t i = 0; i < panels * blocks; ++i) {
      const int64_t first = i / blocks * kPanel;
      multiply_block<D>(p, digits, m0, i % blocks * kBlock, first,
                        min_of(first + kPanel, digits.rows));
    }
  }
}

// Rows of x from which bfloat16 tiles are faster than digits.
[[maybe_unused]] constexpr int64_t kBf16Rows = 5;

template <int D>
void run(const W4A16GemmParams& p) {
#ifdef __AMX_INT8__
  if (D > 1 && p.dtype == DType::kBFloat16 && p.M >= kBf16Rows) return multiply_amx_bf16(p);
  if (p.M > 1) return multiply_amx<D>(p);
#elif defined(LLMKERN_ISA_ZEN4)
  if (D > 1 && p.dtype == DType::kBFloat16) return multiply_bf16(p);
#endif
  multiply<D>(p);
}

}  // namespace

void w4a16_gemm(const W4A16GemmParams& p) {
  if (p.int8_activation)
    run<1>(p);
  else if (p.dtype == DType::kFloat32)
    run<4>(p);
  else
    run<3>(p);
}

}  // namespace llmkern::LLMKERN_ISA
