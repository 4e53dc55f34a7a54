// out[m, n] = sum_k x[m, k] * scales[n, g] * codebook[.., codes[n, k]] + bias[n]
//
// x and w are multiplied in float32, w being the exact product of scale and entry rounded once. Two
// ways, by M:
//
// few   Vectors run along K: each unit of codes is looked up where it lies and multiplied with up
//       to kFewCols rows of x, for R rows of w at a time, which share the loads of x. A row's sum
//       is the sum of its lanes, added pairwise at the end. Bound by reading the codes at M = 1.
// many  Vectors run along M: x is transposed into strips once; a block of w is expanded, a panel of
//       columns at a time, and each strip passes over it while it lies in L1. A panel's sum starts
//       from 0 and is added to the output's, so that rounding errors grow with the number of panels
//       only.
//
// Every sum has a fixed order: a result depends on its row of x, the weight, M's way and the
// instruction set; not on the threads. bfloat16 x has forms of its own: lut4_amx.h, lut4_bf16.h.
#include <omp.h>

#include "kernels.h"
#include "lut4_rows.h"

namespace llmkern::LLMKERN_ISA {
namespace {

// Multiplications below which waking the other threads costs more than it gains.
constexpr int64_t kParallelWork = 1 << 19;
// Elements of x below which one thread prepares them all.
constexpr int64_t kParallelElements = 1 << 16;

// Rows of bfloat16 x from which AMX, where there is any, is faster than vectors.
[[maybe_unused]] constexpr int64_t kAmxLeastRows = 8;

// sums[0 .. count), `stride` apart, plus bias into row m and columns n0 .. of the output.
inline void store_outputs(const Lut4GemmParams& p, int64_t m, int64_t n0, int64_t count,
                          const float* sums, int64_t stride) {
  constexpr int64_t kAtOnce = 64;
  float y[kAtOnce], bias[kAtOnce];
  for (int64_t n = 0; n < count; ++n) y[n] = sums[n * stride];
  if (p.bias) {
    to_float(p.bias, n0, p.dtype, count, bias);
    for (int64_t n = 0; n < count; ++n) y[n] += bias[n];
  }
  from_float(y, count, p.dtype, p.out, m * p.w.N + n0);
}

// --- few rows of x ---

// Most rows of x for which looking codes up again for every kFewCols of them is cheaper than
// expanding w: the lookup costs 4 instructions per unit on AVX-512, 22 on AVX2.
constexpr int64_t kFew = kLanes == 16 ? 8 : 4;
constexpr int kFewCols = 4;
// Rows of w that share the loads of x: as many as the registers hold sums and books of.
template <int C>
constexpr int kSharing = kLanes == 16 ? (C <= 2 ? 8 : 4) : (C == 1 ? 4 : 2);
constexpr int64_t kFewBlock = 32;
constexpr int64_t kCodesPerLine = 128;  // of 64 bytes

// Sum of the lanes, halves added to halves.
inline float lane_sum(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// sums[c][r] = sum_k x[c, k] * w[r, k] over all columns; rows of x lie `w.K` apart.
template <int R, int C>
void dot_rows(const Lut4Weight& w, const Rows& rows, const float* x, float* sums) {
  const uint8_t* codes[R];
  RowBooks row_books[R];
  for (int r = 0; r < R; ++r) {
    codes[r] = rows.codes(r);
    row_books[r] = rows.books(r);
  }
  // The rows of the next pass, which follow these in memory, on their way into L2.
  const int64_t ahead = R * (w.K / 2);
  Vec acc[R][C] = {};
  for (int64_t g = 0, k = 0; k < w.K; ++g) {
    Book books[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) books[r] = row_books[r].at(g, w.book_group_stride);
    for (const int64_t end = k + w.group_size; k < end; k += kUnit) {
      if (k % kCodesPerLine == 0)
        for (int r = 0; r < R; ++r) __builtin_prefetch(codes[r] + k / 2 + ahead, 0, 2);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        Vec values[kUnitVecs];
        look_up(codes[r] + k / 2, books[r], values);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
          for (int v = 0; v < kUnitVecs; ++v)
            acc[r][c] += values[v] * load(x + c * w.K + k + v * kLanes);
      }
    }
  }
  // Unrolled, or the sums would live in memory all along, where a variable index can reach them.
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sums[c * R + r] = lane_sum(acc[r][c]);
}

// Outputs [m0, m0 + C) x [n0, last).
template <int C>
void multiply_few_rows(const Lut4GemmParams& p, const float* x, float* scratch, int64_t m0,
                       int64_t n0, int64_t last) {
  constexpr int R = kSharing<C>;
  Rows rows(p.w, scratch, R);
  float sums[C * R];
  for (; n0 < last; n0 += R) {
    rows.load(n0, R);
    dot_rows<R, C>(p.w, rows, x + m0 * p.w.K, sums);
    for (int c = 0; c < C; ++c) store_outputs(p, m0 + c, n0, min_of(R, last - n0), sums + c * R, 1);
  }
}

void multiply_few(const Lut4GemmParams& p) {
  const int64_t N = p.w.N, K = p.w.K, blocks = ceil_div(N, kFewBlock);
  const int64_t floats = Rows::scratch_floats(p.w, kSharing<1>);
  const bool parallel = p.M * N * K >= kParallelWork;
  const Buffer<float> buffer(padded(p.M * K) + floats * (parallel ? omp_get_max_threads() : 1));
  float* x = buffer.data();
  for (int64_t m = 0; m < p.M; ++m) to_float(p.x, m * p.x_stride, p.dtype, K, x + m * K);
#pragma omp parallel for schedule(dynamic) if (parallel)
  for (int64_t i = 0; i < blocks; ++i) {
    float* scratch = x + padded(p.M * K) + floats * omp_get_thread_num();
    const int64_t n0 = i * kFewBlock, last = min_of(N, n0 + kFewBlock);
    for (int64_t m = 0; m < p.M; m += kFewCols) {
      const int64_t count = min_of(kFewCols, p.M - m);
      if (count == 1) multiply_few_rows<1>(p, x, scratch, m, n0, last);
      if (count == 2) multiply_few_rows<2>(p, x, scratch, m, n0, last);
      if (count == 3) multiply_few_rows<3>(p, x, scratch, m, n0, last);
      if (count == 4) multiply_few_rows<4>(p, x, scratch, m, n0, last);
    }
  }
}

// --- many rows of x ---

// A strip holds kStrip rows of x, transposed: [K][kStrip]. Where the last strip has half as many or
// fewer, only the first half of its lanes is computed.
constexpr int64_t kStrip = 2 * kLanes;
// Rows of x that pass over an expanded block together: 192 of x's 128 columns stay in L2.
constexpr int64_t kPanelRows = 192;
constexpr int64_t kPanelCols = 128;
// Rows of w expanded at a time: 24 KB beside 16 KB of a strip's columns.
constexpr int64_t kBlock = 48;
// Distance of expanded rows, off the powers of two that would crowd a few sets of L1.
constexpr int64_t kExpandedStride = kPanelCols + 16;
// Rows of w per pass over V vectors of a strip: their V * kTile sums fill the registers.
template <int V>
constexpr int kTile = kLanes == 16 ? 16 / V : (V == 1 ? 8 : 6);
static_assert(kBlock % kTile<1> == 0 && kBlock % kTile<2> == 0, "a block is made of whole tiles");
static_assert(kPanelRows % kStrip == 0, "a panel is made of whole strips");

struct Strips {
  const float* x;  // [strips][K][kStrip]
  int64_t rows, count;
};

// Rows of strip s of the panel that starts at row m0, columns first .. last - 1, zeros beyond M.
void transpose(const Lut4GemmParams& p, int64_t m0, int64_t rows, int64_t first, int64_t last,
               float* strip) {
  float x[kStrip][kPanelCols];
  memset(x, 0, sizeof x);
  for (int64_t m = 0; m < rows; ++m)
    to_float(p.x, (m0 + m) * p.x_stride + first, p.dtype, last - first, x[m]);
  for (int64_t k = first; k < last; ++k)
    for (int64_t m = 0; m < kStrip; ++m) strip[k * kStrip + m] = x[m][k - first];
}

// c[j][0 .. V * kLanes) += sum over `columns` of w[j][k] * x[k][0 .. V * kLanes), j < kTile<V>
template <int V>
inline void multiply_tile(int64_t columns, const float* w, const float* x, float* c) {
  constexpr int J = kTile<V>;
  Vec acc[J][V] = {};
  for (int64_t k = 0; k < columns; ++k, x += kStrip) {
    Vec lanes[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) lanes[v] = load(x + v * kLanes);
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[j][v] += lanes[v] * w[j * kExpandedStride + k];
  }
#pragma GCC unroll 16
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* sum = c + j * kStrip + v * kLanes;
      store(sum, load(sum) + acc[j][v]);
    }
}

template <int V>
inline void multiply_strip(int64_t columns, const float* w, const float* x, float* c) {
  for (int64_t j = 0; j < kBlock; j += kTile<V>)
    multiply_tile<V>(columns, w + j * kExpandedStride, x, c + j * kStrip);
}

// Output columns n0 .. n0 + kBlock - 1 of the panel's rows, from m0 of the output.
void multiply_block(const Lut4GemmParams& p, const Strips& strips, float* scratch, int64_t m0,
                    int64_t n0) {
  alignas(64) float sums[kPanelRows * kBlock];  // [strips][kBlock][kStrip]
  alignas(64) float expanded[kBlock * kExpandedStride];
  memset(sums, 0, strips.count * kBlock * kStrip * sizeof(float));
  Rows rows(p.w, scratch, kBlock);
  rows.load(n0, kBlock);
  for (int64_t first = 0; first < p.w.K; first += kPanelCols) {
    const int64_t last = min_of(p.w.K, first + kPanelCols);
    for (int64_t r = 0; r < kBlock; ++r)
      rows.dequantize(r, first, last, expanded + r * kExpandedStride);
    for (int64_t s = 0; s < strips.count; ++s) {
      const float* x = strips.x + (s * p.w.K + first) * kStrip;
      float* c = sums + s * kBlock * kStrip;
      if (strips.rows - s * kStrip <= kLanes)
        multiply_strip<1>(last - first, expanded, x, c);
      else
        multiply_strip<2>(last - first, expanded, x, c);
    }
  }
  for (int64_t m = 0; m < strips.rows; ++m)
    store_outputs(p, m0 + m, n0, min_of(kBlock, p.w.N - n0),
                  sums + m / kStrip * kBlock * kStrip + m % kStrip, kStrip);
}

void multiply_many(const Lut4GemmParams& p) {
  const int64_t N = p.w.N, K = p.w.K, blocks = ceil_div(N, kBlock);
  const int64_t chunks = ceil_div(K, kPanelCols);
  const int64_t strip_floats = ceil_div(min_of(p.M, kPanelRows), kStrip) * K * kStrip;
  const int64_t floats = Rows::scratch_floats(p.w, kBlock);
  const Buffer<float> buffer(strip_floats + floats * omp_get_max_threads());
  float* x = buffer.data();
  for (int64_t m0 = 0; m0 < p.M; m0 += kPanelRows) {
    const int64_t rows = min_of(kPanelRows, p.M - m0);
    const Strips strips{x, rows, ceil_div(rows, kStrip)};
#pragma omp parallel for schedule(static) if (rows * K >= kParallelElements)
    for (int64_t i = 0; i < strips.count * chunks; ++i) {
      const int64_t s = i / chunks, first = i % chunks * kPanelCols;
      transpose(p, m0 + s * kStrip, min_of(kStrip, rows - s * kStrip), first,
                min_of(K, first + kPanelCols), x + s * K * kStrip);
    }
#pragma omp parallel for schedule(dynamic) if (rows * N * K >= kParallelWork)
    for (int64_t i = 0; i < blocks; ++i)
      multiply_block(p, strips, x + strip_floats + floats * omp_get_thread_num(), m0, i * kBlock);
  }
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA

#include "lut4_amx.h"
#include "lut4_bf16.h"

namespace llmkern::LLMKERN_ISA {

void lut4_gemm(const Lut4GemmParams& p) {
#ifdef __AMX_BF16__
  if (p.dtype == DType::kBFloat16 && p.M >= kAmxLeastRows) return multiply_amx(p);
#elif defined(LLMKERN_ISA_ZEN4)
  if (p.dtype == DType::kBFloat16 && p.M <= kFewBf16) return multiply_few_bf16(p);
  if (p.dtype == DType::kBFloat16) return multiply_many_bf16(p);
#endif
  if (p.M <= kFew)
    multiply_few(p);
  else
    multiply_many(p);
}

}  // namespace llmkern::LLMKERN_ISA
