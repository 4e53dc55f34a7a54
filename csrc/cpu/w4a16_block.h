// What the two forms of w4a16_gemm share: limits, workspace, the end of a block of columns.
#pragma once

#include "common/buffer.h"
#include "int4_tile.h"

namespace llmkern::LLMKERN_ISA {
namespace {

// Bound on the digits of x that exist at a time.
constexpr int64_t kWorkspaceBytes = 32 << 20;
// Multiplications below which waking the other threads costs more than it gains.
constexpr int64_t kParallelWork = 1 << 19;
// Elements of x below which one thread splits them all.
constexpr int64_t kParallelSplit = 1 << 16;

// The pieces of a product of `rows` rows: panels of rows by blocks of columns. Panels of a block
// adjoin: its weights stay in a cache between them.
struct Pieces {
  int64_t rows, panel, panels, count;

  Pieces(int64_t rows, int64_t panel, int64_t N)
      : rows(rows),
        panel(panel),
        panels(ceil_div(rows, panel)),
        count(panels * ceil_div(N, kBlock)) {}
  int64_t first(int64_t i) const { return i % panels * panel; }
  int64_t last(int64_t i) const { return min_of(first(i) + panel, rows); }
  int64_t n0(int64_t i) const { return i / panels * kBlock; }
};

// acc [rows, 64] plus bias into rows m0 .. and columns n0 .. of the output.
inline void store_block(const W4A16GemmParams& p, float* acc, int64_t m0, int64_t rows,
                        int64_t n0) {
  const int64_t count = min_of(kBlock, p.w.N - n0);
  float bias[kBlock] = {};
  if (p.bias) to_float(p.bias, n0, p.dtype, count, bias);
  for (int64_t row = 0; row < rows; ++row) {
    float* y = acc + row * kBlock;
    for (int64_t n = 0; n < kBlock; ++n) y[n] += bias[n];
    from_float(y, count, p.dtype, p.out, (m0 + row) * p.w.N + n0);
  }
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
