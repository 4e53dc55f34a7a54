// The column loop of llmkern/reference/obs_quantize.py over a whole matrix, with what is kept
// rounded, or with a mask given or chosen on the way (llmkern/reference/obs_prune.py), or both.
//
// Rows are independent, so a thread takes a panel of rows and needs no one else. It walks the
// columns left to right, left-looking: before a block is quantized it collects what all earlier
// errors push onto it,
//
//   c[n, j] = w[n, j] + sum_{k < j} e[n, k] * U[k, j]
//
// which is a matrix product of N * K^2 flops in all and nearly all of the time. Three nested blocks
// keep its operands near: `outer` columns per pass over the errors so far (a group of weights never
// straddles two), `inner` columns per pass over the outer block's own errors, and tiles of kCols
// columns within those. U is packed into tiles chunk by chunk and used by every strip of the panel.
//
// A dynamic group's grid is fitted to the weights that this walk reaches when it rounds nothing in
// the group, and an unstructured mask is chosen by those that it reaches when it changes nothing in
// the inner block: those columns are walked twice. Only a mask that weighs all rows against each
// other ties panels together: their blocks then go in step, every panel in memory.
//
// Memory traffic per multiply-add stays below 1/64 byte; panels of errors are read once per outer
// block and U once per panel.
#pragma once

#include <new>

#include "cpu/common/buffer.h"
#include "cpu/obs_panel.h"
#include "cpu/obs_select.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace llmkern::LLMKERN_ISA {
namespace {

// One tile's update; a narrow tile goes through a copy, because the columns beside it are not its
// own.
void push(int64_t k, const float* e, const float* u, int64_t cols, float* c) {
  if (cols == kCols) {
    update_tile<1>(k, e, u, kCols, c);
    return;
  }
  alignas(kVecBytes) float full[kCols * kRows] = {};
  std::memcpy(full, c, size_t(cols * kRows) * sizeof(float));
  update_tile<1>(k, e, u, kCols, full);
  std::memcpy(c, full, size_t(cols * kRows) * sizeof(float));
}

// Pushes the errors of columns [k0, k1) onto columns [from, to) of the outer block at `start`.
void push_errors(const Panel& a, int64_t start, int64_t k0, int64_t k1, int64_t from, int64_t to) {
  for (; k0 < k1; k0 += kChunk) {
    const int64_t size = min_of(kChunk, k1 - k0);
    // The packed tiles of kOuter columns fit the L2 cache.
    for (int64_t j0 = from, j1; j0 < to; j0 = j1) {
      for (j1 = j0; j1 < to && j1 - j0 < kOuter; j1 = a.cuts().sub_end(j1)) {
      }
      pack(a, k0, k0 + size, j0, j1);
      for (int64_t s = 0; s < a.strips; ++s) {
        const float* tile = a.tiles;
        for (int64_t j = j0; j < j1; j = a.cuts().tile_end(j), tile += size * kCols)
          push(size, a.error(s, k0), tile, a.cuts().tile_end(j) - j, a.update(s, start, j));
      }
    }
  }
}

// Columns of an inner block of one strip, from its first on.
struct Block {
  const Panel& a;
  int64_t s, i0, i1;  // strip; columns
  const float* w;     // [kRows] each: the weights, as far as their errors do not replace them
  float* e;           // errors of the columns walked; may be w
  float* c;           // updated weights
  int32_t* keep;      // the mask

  Block from(int64_t k) const {
    const int64_t at = (k - i0) * kRows;
    return {a, s, k, i1, w + at, e + at, c + at, keep + at};
  }
  Block into(float* errors, float* updated) const {
    return {a, s, i0, i1, w, errors, updated, keep};
  }
};

// The mask of the n:m group at column k of a sub-block, from the weights reached with none of the
// group changed. Columns of the tile [j, end) have the errors before j in c, later ones none of the
// sub-block's.
void choose_group(const Block& b, int64_t k, int64_t j, int64_t end) {
  const Panel& a = b.a;
  const int64_t size = a.loop->prune->size;
  for (int v = 0; v < kRowVecs; ++v) {
    const auto at = [v](const float* m, int64_t i) -> const Vec& {
      return reinterpret_cast<const Vec*>(m + i * kRows)[v];
    };
    Vec x[kMaxSize], score[kMaxSize];
    for (int64_t i = 0; i < size; ++i) {
      const float* u = a.p().U + b.i0 * a.p().K + b.i0 + k + i;
      x[i] = at(b.c, k + i);
      for (int64_t t = k + i < end ? j : 0; t < k; ++t) x[i] += at(b.e, t) * u[t * a.p().K];
      for (int64_t t = 0; t < i; ++t) x[i] += (at(b.w, k + t) - x[t]) * u[(k + t) * a.p().K];
      const Vec root = x[i] * a.p().d[b.i0 + k + i];
      score[i] = root * root;
    }
    keep_of_every(a.loop->prune->kept, size, score, v, b.keep + k * kRows);
  }
}

// Walks the columns of a sub-block, `size` rows of U in its tiles, the sub-block's own from `tile`
// on: column k's c is brought up to date with e of the sub-block's columns before it, then
// finish(k) sets e. k counts from the sub-block's start, as does the block.
template <typename Finish>
void walk_columns(const Block& b, int64_t size, const float* tile, Finish finish) {
  const Cuts& cuts = b.a.cuts();
  const bool chooses = b.a.loop->of_every();
  const int64_t cols = cuts.sub_end(b.i0) - b.i0;
  for (int64_t j = 0, end; j < cols; j = end, tile += size * kCols) {
    end = cuts.tile_end(b.i0 + j) - b.i0;
    push(j, b.e, tile, end - j, b.c + j * kRows);
    for (int64_t k = j; k < end; ++k) {
      if (chooses && k % b.a.loop->prune->size == 0) choose_group(b, k, j, end);
      Vec* x = reinterpret_cast<Vec*>(b.c + k * kRows);
      for (int64_t i = j; i < k; ++i)
        for (int v = 0; v < kRowVecs; ++v)
          x[v] += reinterpret_cast<const Vec*>(b.e + i * kRows)[v] * tile[i * kCols + k - j];
      finish(k);
    }
  }
}

// The sub-blocks of an inner block whose rows and columns of U are packed: each is brought up to
// date with the errors of those before it, then visit(sub-block, its own tiles) walks it.
template <typename Visit>
void for_each_sub(const Block& b, Visit visit) {
  const Cuts& cuts = b.a.cuts();
  const int64_t size = b.i1 - b.i0;
  const float* tile = b.a.tiles;
  for (int64_t sub = b.i0, end; sub < b.i1; sub = end) {
    end = cuts.sub_end(sub);
    const float *next = tile, *own = tile + (sub - b.i0) * kCols;
    for (int64_t j = sub; j < end; j = cuts.tile_end(j), next += size * kCols)
      push(sub - b.i0, b.e, next, cuts.tile_end(j) - j, b.c + (j - b.i0) * kRows);
    visit(b.from(sub), own);
    tile = next;
  }
}

// Column k kept where the mask says so and not rounded: c becomes its weight, e its error.
inline void leave_unrounded(const Block& b, int64_t k) {
  for (int v = 0; v < kRowVecs; ++v) {
    const int64_t at = k * kRowVecs + v;
    Vec& c = reinterpret_cast<Vec*>(b.c)[at];
    c = masked(c, reinterpret_cast<const Mask*>(b.keep)[at]);
    reinterpret_cast<Vec*>(b.e)[at] = reinterpret_cast<const Vec*>(b.w)[at] - c;
  }
}

inline void keep_all(int64_t cols, int32_t* keep) {
  std::memset(keep, -1, size_t(cols * kRows) * sizeof *keep);
}

void load_mask(const Panel& a, int64_t s, int64_t i0, int64_t i1, int32_t* keep) {
  const uint8_t* mask = a.p().mask + (a.row + s * kRows) * a.p().K + i0;
  keep_all(i1 - i0, keep);
  for (int64_t r = 0; r < a.rows(s); ++r)
    for (int64_t k = 0; k < i1 - i0; ++k)
      keep[k * kRows + r] = -int32_t(mask[r * a.p().K + k] != 0);
}

// Scores of the inner block [i0, i1): what setting each weight to zero costs, with none changed.
void score_block(const Panel& a, int64_t s, int64_t start, int64_t i0, int64_t i1) {
  alignas(kVecBytes) float e[kInner * kRows];
  alignas(kVecBytes) int32_t keep[kInner * kRows];
  keep_all(i1 - i0, keep);
  float* c = a.scores + s * kInner * kRows;
  std::memcpy(c, a.update(s, start, i0), size_t((i1 - i0) * kRows) * sizeof(float));
  for_each_sub({a, s, i0, i1, a.error(s, i0), e, c, keep}, [&](const Block& b, const float* own) {
    walk_columns(b, i1 - i0, own, [&](int64_t k) { leave_unrounded(b, k); });
  });
  for (int64_t k = 0; k < i1 - i0; ++k)
    for (int v = 0; v < kRowVecs; ++v) {
      Vec& x = reinterpret_cast<Vec*>(c)[k * kRowVecs + v];
      x *= a.p().d[i0 + k];
      x *= x;
    }
}

// Column k of a block, from its updated weights c to its error e.
struct ColumnOut {
  float *codes, *w_hat;  // [columns][kRows]
  Vec* loss;             // [kRowVecs]
};

void finish_column(const Block& b, int64_t k, const ColumnOut& out) {
  const Panel& a = b.a;
  const int64_t column = b.i0 + k, g = a.loop->rounds() ? a.p().g_idx[column] : 0;
  const int64_t grid = a.grid(b.s, g);
  const GridOptions options = a.options(b.s, g);
  for (int v = 0; v < kRowVecs; ++v) {
    const int64_t at = k * kRowVecs + v;
    const Vec x = reinterpret_cast<const Vec*>(b.c)[at];
    const Mask keep = reinterpret_cast<const Mask*>(b.keep)[at];
    Vec w_hat = masked(x, keep);
    if (a.loop->rounds()) {
      const Grid on{reinterpret_cast<const Vec*>(a.scales + grid)[v],
                    reinterpret_cast<const Vec*>(a.zeros + grid)[v]};
      const Rounded rounded = round_on(w_hat, on, options, v);
      reinterpret_cast<Vec*>(out.codes)[at] = rounded.code;
      w_hat = masked(rounded.value, keep);
    }
    reinterpret_cast<Vec*>(out.w_hat)[at] = w_hat;
    reinterpret_cast<Vec*>(b.e)[at] = reinterpret_cast<const Vec*>(b.w)[at] - w_hat;
    const Vec residual = (x - w_hat) * a.p().d[column];
    out.loss[v] += residual * residual;
  }
}

// Fits the grid of the group that is the sub-block, to the weights reached with none rounded; the
// scratch holds a sub-block's columns.
void fit_sub_block(const Block& b, int64_t size, const float* own, float* errors, float* reached) {
  const Panel& a = b.a;
  const int64_t cols = a.p().group_size, g = b.i0 / cols;
  std::memcpy(reached, b.c, size_t(cols * kRows) * sizeof(float));
  const Block preview = b.into(errors, reached);
  walk_columns(preview, size, own, [&](int64_t k) { leave_unrounded(preview, k); });
  const int64_t grid = a.grid(b.s, g);
  group_grid(reached, cols, a.options(b.s, g), a.scales + grid, a.zeros + grid);
}

// Goes through the inner block [i0, i1) of strip s; the tiles of U[i0:i1, i0:i1) are packed, and
// the mask is in `keep` unless it is chosen on the way.
void finish_block(const Panel& a, int64_t s, int64_t start, int64_t i0, int64_t i1, int32_t* keep) {
  alignas(kVecBytes) float codes[kInner * kRows], w_hat[kInner * kRows];
  Vec loss[kRowVecs] = {};
  const ObsQuantizeParams& p = a.p();
  const int64_t size = i1 - i0;
  float* e = a.error(s, i0);
  for_each_sub({a, s, i0, i1, e, e, a.update(s, start, i0), keep},
               [&](const Block& b, const float* own) {
                 const int64_t at = (b.i0 - i0) * kRows;
                 const ColumnOut out{codes + at, w_hat + at, loss};
                 if (a.cuts().fit_sub) fit_sub_block(b, size, own, out.codes, out.w_hat);
                 walk_columns(b, size, own, [&](int64_t k) { finish_column(b, k, out); });
               });
  const int64_t rows = a.rows(s), at = (a.row + s * kRows) * p.K + i0;
  if (a.loop->rounds()) store_strip(codes, p.K, rows, size, p.codes + at);
  store_strip(w_hat, p.K, rows, size, p.w_hat + at);
  if (a.loop->chosen())
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < size; ++k)
        a.loop->prune->chosen[at + r * p.K + k] = uint8_t(keep[k * kRows + r] & 1);
  const float* lanes = reinterpret_cast<const float*>(loss);
  for (int r = 0; r < kRows; ++r) a.loss[s * kRows + r] += double(lanes[r]);
}

// Goes through the inner block of every strip; `threshold` is that of a mask over all rows.
void finish_blocks(const Panel& a, int64_t start, int64_t i0, int64_t i1,
                   const Threshold& threshold) {
  alignas(kVecBytes) int32_t keep[kInner * kRows];
  const Loop& loop = *a.loop;
  pack(a, i0, i1, i0, i1);
  for (int64_t s = 0; s < a.strips; ++s) {
    const float* scores = a.scores + s * kInner * kRows;
    if (loop.given())
      load_mask(a, s, i0, i1, keep);
    else if (loop.in_step())
      keep_above(threshold, scores, i1 - i0, a.row + s * kRows, keep);
    else if (loop.scored())
      keep_per_row(scores, i1 - i0, int32_t(loop.removed(i0, i1, 1)), keep);
    else
      keep_all(i1 - i0, keep);
    finish_block(a, s, start, i0, i1, keep);
  }
}

void load_panel(const Panel& a) {
  const ObsQuantizeParams& p = a.p();
  const int64_t groups = a.loop->groups(), books = a.loop->books();
  for (int64_t s = 0; s < a.strips; ++s) {
    const int64_t row = a.row + s * kRows, rows = a.rows(s);
    load_strip(p.w + row * p.K, p.K, rows, p.K, 0, a.error(s, 0));
    for (int r = 0; r < kRows; ++r) a.loss[s * kRows + r] = 0;
    for (int64_t g = 0; g < books; ++g)
      load_strip(p.codebook + row * p.book_row_stride + g * p.book_group_stride, p.book_row_stride,
                 rows, kBookSize, 1, a.books + (s * books + g) * kBookSize * kRows);
    if (p.dynamic || !a.loop->rounds()) continue;
    load_strip(p.scales + row * groups, groups, rows, groups, 1, a.scales + a.grid(s, 0));
    load_strip(p.zeros + row * groups, groups, rows, groups, 0, a.zeros + a.grid(s, 0));
  }
}

void store_panel(const Panel& a) {
  const ObsQuantizeParams& p = a.p();
  const int64_t groups = a.loop->groups();
  for (int64_t s = 0; s < a.strips; ++s) {
    const int64_t row = a.row + s * kRows, rows = a.rows(s);
    for (int64_t r = 0; r < rows; ++r) p.loss[row + r] = float(a.loss[s * kRows + r]);
    if (!p.dynamic || !a.loop->rounds()) continue;
    store_strip(a.scales + a.grid(s, 0), groups, rows, groups, p.scales + row * groups);
    store_strip(a.zeros + a.grid(s, 0), groups, rows, groups, p.zeros + row * groups);
  }
}

// Grids of the group that is the outer block [start, end), from its weights left unrounded. An
// unstructured mask is not known yet: all columns count.
void fit_outer_block(const Panel& a, int64_t start, int64_t end) {
  alignas(kVecBytes) int32_t keep[kInner * kRows];
  const ObsQuantizeParams& p = a.p();
  const int64_t floats = a.strips * a.cuts().outer * kRows;
  const bool moves = start > 0 || a.loop->given() || a.loop->of_every();
  if (moves) {
    std::memcpy(a.saved, a.updated, size_t(floats) * sizeof(float));
    for (int64_t i0 = start, i1; i0 < end; i0 = i1) {
      i1 = a.cuts().inner_end(i0);
      push_errors(a, start, start, i0, i0, i1);
      pack(a, i0, i1, i0, i1);
      for (int64_t s = 0; s < a.strips; ++s) {
        keep_all(i1 - i0, keep);
        if (a.loop->given()) load_mask(a, s, i0, i1, keep);
        float* e = a.error(s, i0);
        const Block b{a, s, i0, i1, e, e, a.update(s, start, i0), keep};
        walk_columns(b, i1 - i0, a.tiles, [&](int64_t k) { leave_unrounded(b, k); });
      }
    }
  }
  const int64_t g = start / p.group_size;
  for (int64_t s = 0; s < a.strips; ++s)
    group_grid(a.update(s, start, start), end - start, a.options(s, g), a.scales + a.grid(s, g),
               a.zeros + a.grid(s, g));
  if (moves) {
    std::memcpy(a.updated, a.saved, size_t(floats) * sizeof(float));
    for (int64_t s = 0; s < a.strips; ++s)
      load_strip(p.w + (a.row + s * kRows) * p.K + start, p.K, a.rows(s), end - start, 0,
                 a.error(s, start));
  }
}

// Brings the outer block [start, end) up to date with all columns before it.
void begin_outer(const Panel& a, int64_t start, int64_t end) {
  for (int64_t s = 0; s < a.strips; ++s)
    std::memcpy(a.update(s, start, start), a.error(s, start),
                size_t((end - start) * kRows) * sizeof(float));
  push_errors(a, start, 0, start, start, end);
  if (a.cuts().fit_outer) fit_outer_block(a, start, end);
}

// Brings the inner block [i0, i1) up to date with the outer block's columns before it, and scores
// it.
void begin_inner(const Panel& a, int64_t start, int64_t i0, int64_t i1) {
  push_errors(a, start, start, i0, i0, i1);
  if (!a.loop->scored()) return;
  pack(a, i0, i1, i0, i1);
  for (int64_t s = 0; s < a.strips; ++s) score_block(a, s, start, i0, i1);
}

void run_panel(const Panel& a) {
  load_panel(a);
  for (int64_t start = 0, end; start < a.p().K; start = end) {
    end = a.cuts().outer_end(start);
    begin_outer(a, start, end);
    for (int64_t i0 = start, i1; i0 < end; i0 = i1) {
      i1 = a.cuts().inner_end(i0);
      begin_inner(a, start, i0, i1);
      finish_blocks(a, start, i0, i1, {});
    }
  }
  store_panel(a);
}

// The threshold below which the `removed` lowest scores of all panels lie; counts [panels][kBins].
Threshold find_threshold(const Panel* panels, int64_t count, int64_t cols, int64_t removed,
                         int32_t* counts) {
  if (removed == 0) return {-1, cols, 0};
  int32_t prefix = 0;
  int64_t equal = 0;
  for (int digit = 0; digit < kDigits; ++digit) {
    std::memset(counts, 0, size_t(count * kBins) * sizeof *counts);
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < count; ++i)
      for (int64_t s = 0; s < panels[i].strips; ++s)
        count_digit(panels[i].scores + s * kInner * kRows, cols, panels[i].rows(s), digit, prefix,
                    counts + i * kBins);
    int32_t value = 0;
    for (;; ++value, removed -= equal) {
      equal = 0;
      for (int64_t i = 0; i < count; ++i) equal += counts[i * kBins + value];
      if (removed <= equal) break;
    }
    prefix = digit == 0 ? value : prefix << 10 | value;
  }
  if (removed == equal) return {prefix, cols, 0};
  for (int64_t k = 0; k < cols; ++k)
    for (int64_t i = 0; i < count; ++i)
      for (int64_t s = 0; s < panels[i].strips; ++s) {
        const float* scores = panels[i].scores + (s * kInner + k) * kRows;
        for (int64_t r = 0; r < panels[i].rows(s); ++r) {
          int32_t bits;
          std::memcpy(&bits, scores + r, sizeof bits);
          if (bits == prefix && removed-- == 0) return {prefix, k, panels[i].row + s * kRows + r};
        }
      }
  return {prefix, cols, 0};
}

// All panels block by block, for a mask that weighs their rows against each other.
void run_in_step(const Panel* panels, int64_t count, int32_t* counts) {
  const Loop& loop = *panels[0].loop;
#pragma omp parallel for schedule(dynamic)
  for (int64_t i = 0; i < count; ++i) load_panel(panels[i]);
  for (int64_t start = 0, end; start < loop.p.K; start = end) {
    end = loop.cuts.outer_end(start);
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) begin_outer(panels[i], start, end);
    for (int64_t i0 = start, i1; i0 < end; i0 = i1) {
      i1 = loop.cuts.inner_end(i0);
#pragma omp parallel for schedule(dynamic)
      for (int64_t i = 0; i < count; ++i) begin_inner(panels[i], start, i0, i1);
      const int64_t removed = loop.removed(i0, i1, loop.p.N);
      const Threshold threshold = find_threshold(panels, count, i1 - i0, removed, counts);
#pragma omp parallel for schedule(dynamic)
      for (int64_t i = 0; i < count; ++i) finish_blocks(panels[i], start, i0, i1, threshold);
    }
  }
#pragma omp parallel for schedule(dynamic)
  for (int64_t i = 0; i < count; ++i) store_panel(panels[i]);
}

void run_loop(const ObsQuantizeParams& p, const ObsPruneParams* prune) {
  const Loop loop(p, prune);
  int64_t threads = 1;
#ifdef _OPENMP
  threads = omp_get_max_threads();
#endif
  const int64_t all = ceil_div(p.N, kRows);
  const int64_t strips = min_of(kPanelStrips, ceil_div(all, threads));
  const int64_t count = ceil_div(all, strips);
  threads = min_of(threads, count);
  const Sizes sizes(loop, strips);
  const auto panel = [&](int64_t i, float* at) {
    return sizes.panel(loop, i * strips * kRows, min_of(strips, all - i * strips), at);
  };
  if (loop.in_step()) {
    Scratch scratch(count * sizes.all());
    Buffer<Panel> panels(count);
    Buffer<int32_t> counts(count * kBins);
    for (int64_t i = 0; i < count; ++i)
      new (panels.data() + i) Panel(panel(i, scratch.data() + i * sizes.all()));
    run_in_step(panels.data(), count, counts.data());
    return;
  }
  Scratch scratch(threads * sizes.all());
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) {
    int64_t thread = 0;
#ifdef _OPENMP
    thread = omp_get_thread_num();
#endif
    run_panel(panel(i, scratch.data() + thread * sizes.all()));
  }
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
