// Blocked Cholesky factorization from the last column to the first: H = R Rᵀ, R upper triangular,
// then U = R / diag(R), d = diag(R).
//
//   R[i, j] = (H[i, j] - sum_{k > j} R[i, k] R[j, k]) / R[j, j],  i < j
//
// K^3 / 3 flops, nearly all in update_tile. R is worked on as strips of kRows rows of its upper
// triangle, K^2 / 2 numbers: both operands of the tiles are then read in place, and H, whose rows
// are columns of the strips, is copied in without a transposition. A blocked left-looking order
// reads the finished columns once per kBlock columns.
#include <cmath>
#include <cstring>

#include "cpu/common/tile.h"
#include "cpu/kernels.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int64_t kBlockStrips = 128 / kRows;
// Strips that share one pass over the block's own rows.
constexpr int64_t kTaskStrips = 8;

// The upper triangle in strips: strip i holds columns [i * kRows, padded K), column by column.
// Beyond K the matrix is continued by the identity.
struct Strips {
  float* data;
  int64_t count;

  int64_t columns() const { return count * kRows; }
  static int64_t floats(int64_t count) { return count * (count + 1) / 2 * kRows * kRows; }
  // Column `k` of strip i, k >= i * kRows.
  float* at(int64_t i, int64_t k) const {
    const int64_t before = i * count - i * (i - 1) / 2;  // square blocks in the strips above
    return data + before * kRows * kRows + (k - i * kRows) * kRows;
  }
};

void load_strip(const HessianFactorParams& p, const Strips& R, int64_t i) {
  const int64_t row = i * kRows, rows = min_of(kRows, p.K - row);
  for (int64_t j = row; j < R.columns(); ++j) {
    float* to = R.at(i, j);
    const int64_t above = j < p.K ? min_of(rows, j - row) : 0;
    for (int64_t r = above; r < kRows; ++r) to[r] = 0;
    if (p.order == nullptr) {
      std::memcpy(to, p.H + j * p.K + row, size_t(above) * sizeof(float));
    } else {
      const int64_t b = p.order[j < p.K ? j : 0];
      for (int64_t r = 0; r < above; ++r) {
        const int64_t a = p.order[row + r];
        to[r] = a < b ? p.H[b * p.K + a] : p.H[a * p.K + b];
      }
    }
    if (j < row + kRows)
      to[j - row] = j < p.K ? p.diagonal[p.order == nullptr ? j : p.order[j]] : 1.0f;
  }
}

// Subtracts the finished columns [k0, k1) from columns [from, to) of strips [i0, i1).
void subtract(const Strips& R, int64_t i0, int64_t i1, int64_t k0, int64_t k1, int64_t from,
              int64_t to) {
  for (int64_t k = k0; k < k1; k += kChunk) {
    const int64_t size = min_of(kChunk, k1 - k);
    for (int64_t i = i0; i < i1; ++i)
      for (int64_t j = from > i * kRows ? from : i * kRows; j < to; j += kCols)
        update_tile<-1>(size, R.at(i, k), R.at(j / kRows, k) + j % kRows, kRows, R.at(i, j));
  }
}

// x = column j of strip i, minus columns (j, to) that lie in the same block and are finished.
inline void subtract_column(const Strips& R, int64_t i, int64_t j, int64_t to, Vec (&x)[kRowVecs]) {
  const Vec* column = reinterpret_cast<const Vec*>(R.at(i, j));
  for (int v = 0; v < kRowVecs; ++v) x[v] = column[v];
  const float* pivot = R.at(j / kRows, j) + j % kRows;
  for (int64_t k = j + 1; k < to; ++k) {
    const Vec* done = reinterpret_cast<const Vec*>(R.at(i, k));
    pivot += kRows;
    for (int v = 0; v < kRowVecs; ++v) x[v] -= done[v] * *pivot;
  }
}

inline void store_divided(const Strips& R, int64_t i, int64_t j, float pivot,
                          const Vec (&x)[kRowVecs]) {
  Vec* column = reinterpret_cast<Vec*>(R.at(i, j));
  for (int v = 0; v < kRowVecs; ++v) column[v] = x[v] / pivot;
}

// Factors the square block of columns [from, to) in place; false if it is not positive definite.
bool factor_block(const Strips& R, int64_t from, int64_t to) {
  for (int64_t j = to - 1; j >= from; --j) {
    const int64_t own = j / kRows;
    Vec x[kRowVecs];
    subtract_column(R, own, j, to, x);
    float lanes[kRows];
    std::memcpy(lanes, x, sizeof x);
    const float square = lanes[j % kRows];
    if (!(square > 0) || !std::isfinite(square)) return false;
    const float pivot = std::sqrt(square);
    store_divided(R, own, j, pivot, x);
    // Lanes below the diagonal are not part of the triangle.
    for (int64_t r = j % kRows + 1; r < kRows; ++r) R.at(own, j)[r] = 0;
    R.at(own, j)[j % kRows] = pivot;
    for (int64_t i = from / kRows; i < own; ++i) {
      subtract_column(R, i, j, to, x);
      store_divided(R, i, j, pivot, x);
    }
  }
  return true;
}

// Columns [from, to) of strip i above the block, once all later blocks have been subtracted.
void solve_block(const Strips& R, int64_t i, int64_t from, int64_t to) {
  for (int64_t tile = to - kCols; tile >= from; tile -= kCols) {
    subtract(R, i, i + 1, tile + kCols, to, tile, tile + kCols);
    for (int64_t j = tile + kCols - 1; j >= tile; --j) {
      Vec x[kRowVecs];
      subtract_column(R, i, j, tile + kCols, x);
      store_divided(R, i, j, R.at(j / kRows, j)[j % kRows], x);
    }
  }
}

bool factor(const Strips& R) {
  const int64_t end = R.columns();
  int64_t threads = 1;
#ifdef _OPENMP
  threads = omp_get_max_threads();
#endif
  for (int64_t last = R.count; last > 0;) {
    const int64_t first = last > kBlockStrips ? last - kBlockStrips : 0;
    const int64_t from = first * kRows, to = last * kRows;
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t i = first; i < last; ++i)
      for (int64_t j = first; j < last; ++j)
        subtract(R, i, i + 1, to, end, j * kRows, (j + 1) * kRows);
    if (!factor_block(R, from, to)) return false;
    const int64_t task = min_of(kTaskStrips, ceil_div(first + 1, threads));
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < first; i += task) {
      const int64_t i1 = min_of(i + task, first);
      subtract(R, i, i1, to, end, from, to);
      for (int64_t s = i; s < i1; ++s) solve_block(R, s, from, to);
    }
    last = first;
  }
  return true;
}

// Rows of strip i of U = R / diag(R), and of d.
void store_strip(const HessianFactorParams& p, const Strips& R, const float* d, int64_t i) {
  const int64_t row = i * kRows, rows = min_of(kRows, p.K - row);
  for (int64_t r = 0; r < rows; ++r) {
    float* to = p.U + (row + r) * p.K;
    std::memset(to, 0, size_t(row) * sizeof(float));
    p.d[row + r] = d[row + r];
  }
  for (int64_t j0 = row; j0 < p.K; j0 += 16) {
    const int64_t j1 = min_of(j0 + 16, p.K);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = j0; j < j1; ++j)
        p.U[(row + r) * p.K + j] = j < row + r ? 0.0f : R.at(i, j)[r] / d[j];
  }
}

}  // namespace

bool hessian_factor(const HessianFactorParams& p) {
  const int64_t count = ceil_div(p.K, kRows), triangle = Strips::floats(count);
  Scratch scratch(triangle + count * kRows);
  const Strips R{scratch.data(), count};
#pragma omp parallel for schedule(dynamic)
  for (int64_t i = 0; i < count; ++i) load_strip(p, R, i);
  if (!factor(R)) return false;
  float* d = scratch.data() + triangle;
  for (int64_t j = 0; j < p.K; ++j) d[j] = R.at(j / kRows, j)[j % kRows];
#pragma omp parallel for schedule(dynamic)
  for (int64_t i = 0; i < count; ++i) store_strip(p, R, d, i);
  return true;
}

}  // namespace llmkern::LLMKERN_ISA
