// The column loop of llmkern/reference/obs_quantize.py over a whole matrix.
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
// columns within those. A dynamic group's grid is fitted to the weights that this walk reaches when
// it rounds nothing in the group, so its columns are walked twice. U is packed into tiles chunk by
// chunk and used by every strip of the panel.
//
// Memory traffic per multiply-add stays below 1/64 byte; panels of errors are read once per outer
// block and U once per panel.
#include "cpu/common/grid.h"
#include "cpu/common/tile.h"
#include "cpu/kernels.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int64_t kInner = 128, kOuter = 512;
constexpr int64_t kPanelStrips = 16;

// How the columns are cut. A dynamic group is whole within one inner block, or is an outer block.
struct Cuts {
  int64_t K, outer, inner, sub;
  bool fit_sub, fit_outer;  // where a dynamic group's grid is computed, if anywhere

  explicit Cuts(const ObsQuantizeParams& p)
      : K(p.K),
        fit_sub(p.dynamic && p.group_size <= kInner),
        fit_outer(p.dynamic && p.group_size > kInner) {
    inner = fit_sub ? kInner / p.group_size * p.group_size : kInner;
    sub = fit_sub ? p.group_size : inner;
    outer = min_of(fit_outer ? p.group_size : kOuter / inner * inner, K);
  }
  int64_t outer_end(int64_t k) const { return min_of((k / outer + 1) * outer, K); }
  int64_t inner_end(int64_t k) const { return end(k, inner); }
  int64_t sub_end(int64_t k) const { return end(k, sub); }
  int64_t tile_end(int64_t k) const { return min_of(k + kCols, sub_end(k)); }

 private:
  int64_t end(int64_t k, int64_t size) const {
    const int64_t start = k / outer * outer;
    return min_of(start + ((k - start) / size + 1) * size, outer_end(k));
  }
};

// What one thread works on: `strips` strips of kRows rows from `row` on.
struct Panel {
  const ObsQuantizeParams& p;
  const Cuts& cuts;
  int64_t row, strips;
  float* errors;   // [strips][K][kRows]: the weights, each column replaced by its error
  float* updated;  // [strips][outer][kRows]: c above, of the current outer block
  float* saved;    // likewise, while the weights left unrounded are in `updated`
  float* scales;   // [strips][groups][kRows]
  float* zeros;    // likewise
  float* tiles;    // U packed: [tiles][rows of U][kCols]
  double* loss;    // [strips][kRows]

  int64_t groups() const { return p.K / p.group_size; }
  int64_t rows(int64_t s) const { return min_of(kRows, p.N - row - s * kRows); }
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

template <typename T>
void store_strip(const float* strip, int64_t stride, int64_t rows, int64_t cols, T* to) {
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
    for (int64_t j = from; j < to; j = a.cuts.tile_end(j), tile += (k1 - k0) * kCols) {
      const int64_t cols = a.cuts.tile_end(j) - j;
      for (int64_t k = rows; k < rows_end; ++k) {
        const float* u = a.p.U + k * a.p.K + j;
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
  const int64_t K = a.p.K, outer = a.cuts.outer;
  for (; k0 < k1; k0 += kChunk) {
    const int64_t size = min_of(kChunk, k1 - k0);
    // The packed tiles of kOuter columns fit the L2 cache.
    for (int64_t j0 = from, j1; j0 < to; j0 = j1) {
      for (j1 = j0; j1 < to && j1 - j0 < kOuter; j1 = a.cuts.sub_end(j1)) {
      }
      pack(a, k0, k0 + size, j0, j1);
      for (int64_t s = 0; s < a.strips; ++s) {
        const float* e = a.errors + (s * K + k0) * kRows;
        float* c = a.updated + (s * outer - start) * kRows;
        const float* tile = a.tiles;
        for (int64_t j = j0; j < j1; j = a.cuts.tile_end(j), tile += size * kCols)
          push(size, e, tile, a.cuts.tile_end(j) - j, c + j * kRows);
      }
    }
  }
}

// Quantizes column k of a strip, from its updated weights c to its error e (the weights before).
struct ColumnOut {
  float *codes, *w_hat;  // [kRows]
  Vec* loss;             // [kRowVecs]
};

void quantize_column(const Panel& a, int64_t s, int64_t k, const float* c, float* e,
                     const ColumnOut& out) {
  const float top = float((1 << a.p.bits) - 1), d = a.p.d[k];
  const int64_t grid = (s * a.groups() + a.p.g_idx[k]) * kRows;
  for (int v = 0; v < kRowVecs; ++v) {
    const Vec scale = reinterpret_cast<const Vec*>(a.scales + grid)[v];
    const Vec zero = reinterpret_cast<const Vec*>(a.zeros + grid)[v];
    const Vec x = reinterpret_cast<const Vec*>(c)[v];
    const Vec code = quantize(x, scale, zero, top);
    const Vec w_hat = scale * (code - zero);
    reinterpret_cast<Vec*>(out.codes)[v] = code;
    reinterpret_cast<Vec*>(out.w_hat)[v] = w_hat;
    Vec& error = reinterpret_cast<Vec*>(e)[v];
    error = error - w_hat;
    const Vec residual = (x - w_hat) * d;
    out.loss[v] += residual * residual;
  }
}

// Walks the columns of a sub-block, `size` rows of U in its tiles, the sub-block's own from `tile`
// on: column k's c is brought up to date with e of the sub-block's columns before it, then
// finish(k) sets e. k counts from the sub-block's start.
template <typename Finish>
void walk_columns(const Cuts& cuts, int64_t sub, int64_t size, const float* tile, const float* e,
                  float* c, Finish finish) {
  const int64_t cols = cuts.sub_end(sub) - sub;
  for (int64_t j = 0, end; j < cols; j = end, tile += size * kCols) {
    end = cuts.tile_end(sub + j) - sub;
    push(j, e, tile, end - j, c + j * kRows);
    for (int64_t k = j; k < end; ++k) {
      Vec* x = reinterpret_cast<Vec*>(c + k * kRows);
      for (int64_t i = j; i < k; ++i)
        for (int v = 0; v < kRowVecs; ++v)
          x[v] += reinterpret_cast<const Vec*>(e + i * kRows)[v] * tile[i * kCols + k - j];
      finish(k);
    }
  }
}

// The error of a column that is not rounded: e = w - c.
inline void leave_unrounded(const float* w, const float* c, float* e) {
  for (int v = 0; v < kRowVecs; ++v)
    reinterpret_cast<Vec*>(e)[v] =
        reinterpret_cast<const Vec*>(w)[v] - reinterpret_cast<const Vec*>(c)[v];
}

GridOptions grid_options(const ObsQuantizeParams& p) {
  return {p.bits, p.symmetric, p.clip_search, p.scales_dtype};
}

// Quantizes the inner block [i0, i1) of strip s; the tiles of U[i0:i1, i0:i1) are packed.
void quantize_block(const Panel& a, int64_t s, int64_t start, int64_t i0, int64_t i1) {
  alignas(kVecBytes) float codes[kInner * kRows], w_hat[kInner * kRows];
  Vec loss[kRowVecs] = {};
  const ObsQuantizeParams& p = a.p;
  const int64_t size = i1 - i0;
  float* errors = a.errors + s * p.K * kRows;
  float* c = a.updated + (s * a.cuts.outer - start) * kRows;
  const float* tile = a.tiles;
  for (int64_t sub = i0, sub_end; sub < i1; sub = sub_end) {
    sub_end = a.cuts.sub_end(sub);
    const float *next = tile, *own = tile + (sub - i0) * kCols;
    for (int64_t j = sub; j < sub_end; j = a.cuts.tile_end(j), next += size * kCols)
      push(sub - i0, errors + i0 * kRows, next, a.cuts.tile_end(j) - j, c + j * kRows);
    float *sub_codes = codes + (sub - i0) * kRows, *sub_w_hat = w_hat + (sub - i0) * kRows;
    float *sub_errors = errors + sub * kRows, *sub_c = c + sub * kRows;
    if (a.cuts.fit_sub) {
      // The columns' places in codes and w_hat are still free: errors and weights left unrounded.
      std::memcpy(sub_w_hat, sub_c, size_t((sub_end - sub) * kRows) * sizeof(float));
      if (sub > 0)
        walk_columns(a.cuts, sub, size, own, sub_codes, sub_w_hat, [&](int64_t k) {
          leave_unrounded(sub_errors + k * kRows, sub_w_hat + k * kRows, sub_codes + k * kRows);
        });
      const int64_t grid = (s * a.groups() + sub / p.group_size) * kRows;
      group_grid(sub_w_hat, sub_end - sub, grid_options(p), a.scales + grid, a.zeros + grid);
    }
    walk_columns(a.cuts, sub, size, own, sub_errors, sub_c, [&](int64_t k) {
      quantize_column(a, s, sub + k, sub_c + k * kRows, sub_errors + k * kRows,
                      {sub_codes + k * kRows, sub_w_hat + k * kRows, loss});
    });
    tile = next;
  }
  const int64_t rows = a.rows(s), at = (a.row + s * kRows) * p.K + i0;
  store_strip(codes, p.K, rows, size, p.codes + at);
  store_strip(w_hat, p.K, rows, size, p.w_hat + at);
  const float* lanes = reinterpret_cast<const float*>(loss);
  for (int r = 0; r < kRows; ++r) a.loss[s * kRows + r] += double(lanes[r]);
}

void load_panel(const Panel& a) {
  const ObsQuantizeParams& p = a.p;
  const int64_t groups = a.groups();
  for (int64_t s = 0; s < a.strips; ++s) {
    const int64_t row = a.row + s * kRows, rows = a.rows(s);
    load_strip(p.w + row * p.K, p.K, rows, p.K, 0, a.errors + s * p.K * kRows);
    for (int r = 0; r < kRows; ++r) a.loss[s * kRows + r] = 0;
    if (p.dynamic) continue;
    load_strip(p.scales + row * groups, groups, rows, groups, 1, a.scales + s * groups * kRows);
    load_strip(p.zeros + row * groups, groups, rows, groups, 0, a.zeros + s * groups * kRows);
  }
}

void store_panel(const Panel& a) {
  const ObsQuantizeParams& p = a.p;
  const int64_t groups = a.groups();
  for (int64_t s = 0; s < a.strips; ++s) {
    const int64_t row = a.row + s * kRows, rows = a.rows(s);
    for (int64_t r = 0; r < rows; ++r) p.loss[row + r] = float(a.loss[s * kRows + r]);
    if (!p.dynamic) continue;
    store_strip(a.scales + s * groups * kRows, groups, rows, groups, p.scales + row * groups);
    store_strip(a.zeros + s * groups * kRows, groups, rows, groups, p.zeros + row * groups);
  }
}

// Grids of the group that is the outer block [start, end), from its weights left unrounded.
void fit_outer_block(const Panel& a, int64_t start, int64_t end) {
  const ObsQuantizeParams& p = a.p;
  const int64_t floats = a.strips * a.cuts.outer * kRows;
  if (start > 0) {
    std::memcpy(a.saved, a.updated, size_t(floats) * sizeof(float));
    for (int64_t i0 = start, i1; i0 < end; i0 = i1) {
      i1 = a.cuts.inner_end(i0);
      push_errors(a, start, start, i0, i0, i1);
      pack(a, i0, i1, i0, i1);
      for (int64_t s = 0; s < a.strips; ++s) {
        float* e = a.errors + (s * p.K + i0) * kRows;
        float* c = a.updated + (s * a.cuts.outer + i0 - start) * kRows;
        walk_columns(a.cuts, i0, i1 - i0, a.tiles, e, c, [&](int64_t k) {
          leave_unrounded(e + k * kRows, c + k * kRows, e + k * kRows);
        });
      }
    }
  }
  for (int64_t s = 0; s < a.strips; ++s) {
    const int64_t grid = (s * a.groups() + start / p.group_size) * kRows;
    group_grid(a.updated + s * a.cuts.outer * kRows, end - start, grid_options(p), a.scales + grid,
               a.zeros + grid);
  }
  if (start > 0) {
    std::memcpy(a.updated, a.saved, size_t(floats) * sizeof(float));
    for (int64_t s = 0; s < a.strips; ++s)
      load_strip(p.w + (a.row + s * kRows) * p.K + start, p.K, a.rows(s), end - start, 0,
                 a.errors + (s * p.K + start) * kRows);
  }
}

void quantize_panel(const Panel& a) {
  const ObsQuantizeParams& p = a.p;
  load_panel(a);
  for (int64_t start = 0, end; start < p.K; start = end) {
    end = a.cuts.outer_end(start);
    for (int64_t s = 0; s < a.strips; ++s)
      std::memcpy(a.updated + s * a.cuts.outer * kRows, a.errors + (s * p.K + start) * kRows,
                  size_t((end - start) * kRows) * sizeof(float));
    push_errors(a, start, 0, start, start, end);
    if (a.cuts.fit_outer) fit_outer_block(a, start, end);
    for (int64_t i0 = start, i1; i0 < end; i0 = i1) {
      i1 = a.cuts.inner_end(i0);
      push_errors(a, start, start, i0, i0, i1);
      pack(a, i0, i1, i0, i1);
      for (int64_t s = 0; s < a.strips; ++s) quantize_block(a, s, start, i0, i1);
    }
  }
  store_panel(a);
}

}  // namespace

void obs_quantize(const ObsQuantizeParams& p) {
  const Cuts cuts(p);
  int64_t threads = 1;
#ifdef _OPENMP
  threads = omp_get_max_threads();
#endif
  const int64_t all = ceil_div(p.N, kRows);
  const int64_t strips = min_of(kPanelStrips, ceil_div(all, threads));
  const int64_t panels = ceil_div(all, strips);
  threads = min_of(threads, panels);
  // At most kOuter columns and a sub-block, and the inner block's own rows, are packed at a time.
  const int64_t width = min_of(p.K, kOuter + cuts.inner);
  const int64_t tiles = ceil_div(width, min_of(cuts.sub, kCols)) + ceil_div(width, cuts.sub);
  const int64_t groups = p.K / p.group_size;
  const int64_t errors = padded(strips * p.K * kRows),
                updated = padded(strips * cuts.outer * kRows);
  const int64_t grids = padded(strips * groups * kRows), packed = padded(tiles * kInner * kCols);
  const int64_t losses = padded(2 * strips * kRows);
  const int64_t saved = cuts.fit_outer ? updated : 0;
  const int64_t each = errors + updated + saved + 2 * grids + packed + losses;
  Scratch scratch(threads * each);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t i = 0; i < panels; ++i) {
    int64_t thread = 0;
#ifdef _OPENMP
    thread = omp_get_thread_num();
#endif
    float* at = scratch.data() + thread * each;
    float* grid = at + errors + updated + saved;
    Panel panel{p,
                cuts,
                i * strips * kRows,
                min_of(strips, all - i * strips),
                at,
                at + errors,
                at + errors + updated,
                grid,
                grid + grids,
                grid + 2 * grids,
                reinterpret_cast<double*>(at + each - losses)};
    quantize_panel(panel);
  }
}

}  // namespace llmkern::LLMKERN_ISA
