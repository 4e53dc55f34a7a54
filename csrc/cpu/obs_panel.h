// How the loop of obs_loop.h cuts a matrix, and what one thread works on.
#pragma once

#include <cmath>
#include <cstring>

#include "cpu/common/grid.h"
#include "cpu/common/tile.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int64_t kInner = 128, kOuter = 512;
constexpr int64_t kPanelStrips = 16;

// How the columns are cut. A dynamic group is whole within one inner block, or is an outer block;
// an n:m group lies in one inner block, and in one tile if that is wide enough.
struct Cuts {
  int64_t K, outer, inner, sub, tile;
  bool fit_sub, fit_outer;  // where a dynamic group's grid is computed, if anywhere

  Cuts(const ObsQuantizeParams& p, int64_t size)
      : K(p.K),
        fit_sub(p.codes != nullptr && p.dynamic && p.group_size <= kInner),
        fit_outer(p.codes != nullptr && p.dynamic && p.group_size > kInner) {
    const int64_t unit = fit_sub ? p.group_size : size;
    inner = kInner / unit * unit;
    sub = fit_sub ? p.group_size : inner;
    outer = min_of(fit_outer ? p.group_size : kOuter / inner * inner, K);
    tile = size <= kCols ? kCols / size * size : kCols;
  }
  int64_t outer_end(int64_t k) const { return min_of((k / outer + 1) * outer, K); }
  int64_t inner_end(int64_t k) const { return end(k, inner); }
  int64_t sub_end(int64_t k) const { return end(k, sub); }
  int64_t tile_end(int64_t k) const { return min_of(k + tile, sub_end(k)); }

 private:
  int64_t end(int64_t k, int64_t size) const {
    const int64_t start = k / outer * outer;
    return min_of(start + ((k - start) / size + 1) * size, outer_end(k));
  }
};

// A loop and how its mask comes about: given in p.mask, or chosen as `prune` says.
struct Loop {
  const ObsQuantizeParams& p;
  const ObsPruneParams* prune;  // null: all columns that p.mask does not rule out are kept
  Cuts cuts;

  Loop(const ObsQuantizeParams& p, const ObsPruneParams* prune)
      : p(p), prune(prune), cuts(p, chosen() && prune->size > 0 ? prune->size : 1) {}
  bool rounds() const { return p.codes != nullptr; }
  bool given() const { return p.mask != nullptr; }
  bool chosen() const { return prune != nullptr && !given(); }
  bool of_every() const { return chosen() && prune->size > 0; }
  bool scored() const { return chosen() && prune->size == 0; }
  bool in_step() const { return scored() && !prune->per_row; }
  int64_t groups() const { return rounds() ? p.K / p.group_size : 0; }
  int64_t books() const {
    return p.codebook == nullptr ? 0 : p.book_group_stride == 0 ? 1 : groups();
  }
  // How many of the first `columns` columns of `rows` rows go.
  int64_t removed_until(int64_t columns, int64_t rows) const {
    return int64_t(std::nearbyint(prune->sparsity * double(rows * columns)));
  }
  int64_t removed(int64_t i0, int64_t i1, int64_t rows) const {
    return removed_until(i1, rows) - removed_until(i0, rows);
  }
};

// What one thread works on: `strips` strips of kRows rows from `row` on.
struct Panel {
  const Loop* loop;
  int64_t row, strips;
  float* errors;   // [strips][K][kRows]: the weights, each column replaced by its error
  float* updated;  // [strips][outer][kRows]: c above, of the current outer block
  float* saved;    // likewise, while the weights left unrounded are in `updated`
  float* scores;   // [strips][inner][kRows], of the current inner block
  float* scales;   // [strips][groups][kRows]
  float* zeros;    // likewise
  float* books;    // [strips][books][kBookSize][kRows]
  float* tiles;    // U packed: [tiles][rows of U][kCols]
  double* loss;    // [strips][kRows]

  const ObsQuantizeParams& p() const { return loop->p; }
  const Cuts& cuts() const { return loop->cuts; }
  int64_t rows(int64_t s) const { return min_of(kRows, p().N - row - s * kRows); }
  int64_t grid(int64_t s, int64_t g) const { return (s * loop->groups() + g) * kRows; }
  // Columns k.. of strip s; those of the outer block at `start`.
  float* error(int64_t s, int64_t k) const { return errors + (s * p().K + k) * kRows; }
  float* update(int64_t s, int64_t start, int64_t k) const {
    return updated + (s * cuts().outer + k - start) * kRows;
  }
  GridOptions options(int64_t s, int64_t g) const {
    const int64_t count = loop->books(), at = s * count + (count > 1 ? g : 0);
    return {p().bits, p().symmetric, p().clip_search, p().scales_dtype,
            count == 0 ? nullptr : books + at * kBookSize * kRows};
  }
};

// Transposes rows of a row-major matrix into a strip, missing rows filled with `fill`.
void load_strip(const float* from, int64_t stride, int64_t rows, int64_t cols, float fill,
                float* strip) {
  for (int64_t k0 = 0; k0 < cols; k0 += 16) {
    const int64_t k1 = min_of(k0 + 16, cols);
    for (int64_t r = 0; r < kRows; ++r)
      for (int64_t k = k0; k < k1; ++k)
        strip[k * kRows + r] = r < rows ? from[r * stride + k] : fill;
  }
}

template <typename From, typename T>
void store_strip(const From* strip, int64_t stride, int64_t rows, int64_t cols, T* to) {
  for (int64_t k0 = 0; k0 < cols; k0 += 16) {
    const int64_t k1 = min_of(k0 + 16, cols);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = k0; k < k1; ++k) to[r * stride + k] = T(strip[k * kRows + r]);
  }
}

// Packs U[k0:k1, from:to) into tiles [k1 - k0][kCols], missing columns zero; a few rows at a time,
// which bounds the pages in use.
void pack(const Panel& a, int64_t k0, int64_t k1, int64_t from, int64_t to) {
  for (int64_t rows = k0; rows < k1; rows += 16) {
    const int64_t rows_end = min_of(rows + 16, k1);
    float* tile = a.tiles;
    for (int64_t j = from; j < to; j = a.cuts().tile_end(j), tile += (k1 - k0) * kCols) {
      const int64_t cols = a.cuts().tile_end(j) - j;
      for (int64_t k = rows; k < rows_end; ++k) {
        const float* u = a.p().U + k * a.p().K + j;
        float* out = tile + (k - k0) * kCols;
        if (cols == kCols) {
          std::memcpy(out, u, kCols * sizeof(float));
        } else {
          for (int64_t c = 0; c < kCols; ++c) out[c] = c < cols ? u[c] : 0.0f;
        }
      }
    }
  }
}

// Sizes, in floats, of the buffers of a panel of `strips` strips.
struct Sizes {
  int64_t errors, updated, saved, scores, grids, books, tiles, losses;

  Sizes(const Loop& loop, int64_t strips) {
    const Cuts& cuts = loop.cuts;
    // At most kOuter columns and a sub-block, and the inner block's own rows, are packed at a time.
    const int64_t width = min_of(cuts.K, kOuter + cuts.inner);
    const int64_t count = ceil_div(width, min_of(cuts.sub, cuts.tile)) + ceil_div(width, cuts.sub);
    errors = padded(strips * cuts.K * kRows);
    updated = padded(strips * cuts.outer * kRows);
    saved = cuts.fit_outer ? updated : 0;
    scores = loop.scored() ? padded(strips * kInner * kRows) : 0;
    grids = padded(strips * loop.groups() * kRows);
    books = padded(strips * loop.books() * kBookSize * kRows);
    tiles = padded(count * kInner * kCols);
    losses = padded(2 * strips * kRows);
  }
  int64_t all() const {
    return errors + updated + saved + scores + 2 * grids + books + tiles + losses;
  }
  Panel panel(const Loop& loop, int64_t row, int64_t strips, float* at) const {
    Panel a{&loop,   row,     strips,  at,      nullptr, nullptr,
            nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    a.updated = a.errors + errors;
    a.saved = a.updated + updated;
    a.scores = a.saved + saved;
    a.scales = a.scores + scores;
    a.zeros = a.scales + grids;
    a.books = a.zeros + grids;
    a.tiles = a.books + books;
    a.loss = reinterpret_cast<double*>(a.tiles + tiles);
    return a;
  }
};

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
