// lut4_gemm by bfloat16 dot products (vdpbf16ps) for bfloat16 x, where they run at full rate. The
// weight is rounded to bfloat16 once, as its product of scale and entry: the values are those of
// torch's product with the dequantized weight. For few rows of x and a single book its entries are
// rounded instead, and the sums of groups scaled: fewer steps, and no larger errors (RoundedBook).
// Sums are float32's. Two ways, by M:
//
// few   Vectors run along K: the codes of R rows of w are looked up where they lie and meet up to
//       kFewCols rows of x. Bound by reading the codes at M = 1.
// many  Vectors run along M: a block of w is expanded, a panel of columns at a time, and strips of
//       16 rows of x pass over it.
//
// A row's result depends on neither its neighbours nor the threads, nor on M while M is served by
// one of them. Subnormal elements of x and w count as 0.
#pragma once

#include <math.h>

#include "common/shares.h"
#include "lut4_rows.h"

#ifdef LLMKERN_ISA_ZEN4

namespace llmkern::LLMKERN_ISA {
namespace {

// K is cut into windows of 128 columns, 64 bytes of codes; the last one may end in zeros. Word j of
// a window, shifted right by 4 * v bits, begins with the code of one column: vector v (0 .. 3) of
// the window takes from it column 32 * (j / 8) + 2 * (j % 8) + 16 * (v % 2) + v / 2.
constexpr int64_t kWindow = 128, kVectors = 4, kWords = 32;

// A window of x as its four vectors.
inline void order_window(const uint16_t* x, int64_t columns, uint16_t* out) {
  // Of a unit: the 8 words of vector 0, those of vector 1, ...
  alignas(64) uint16_t order[kWords], words[kWords];
  for (int i = 0; i < kWords; ++i) order[i] = uint16_t(2 * (i % 8) + 16 * (i / 8 % 2) + i / 16);
  for (int64_t unit = 0; unit < kWindow / kUnit; ++unit, x += kUnit) {
    const bool inside = unit * kUnit < columns;
    const __m512i in = inside ? _mm512_loadu_si512(x) : _mm512_setzero_si512();
    _mm512_store_si512(words, _mm512_permutexvar_epi16(_mm512_load_si512(order), in));
    for (int64_t v = 0; v < kVectors; ++v) memcpy(out + v * kWords + 8 * unit, words + 8 * v, 16);
  }
}

// The window that a pass along K is at: what its rows share. HALVES: each 64 columns of a window
// lie in one group, as they do unless group_size is an odd multiple of 32.
template <bool HALVES>
struct Window {
  static constexpr int64_t kBooks = HALVES ? 2 : 4, kColumns = kWindow / kBooks;
  int64_t first, groups[kBooks];
  __mmask32 inside;
  __m512i book_bits;  // which book a word uses, above its code

  Window(const Lut4Weight& w, int64_t column) : first(column) {
    alignas(64) uint16_t bits[kWords];
    for (int64_t j = 0; j < kWords; ++j) bits[j] = uint16_t(j * kBooks / kWords << 4);
    book_bits = _mm512_load_si512(bits);
    group_ = first / w.group_size;
    in_group_ = first % w.group_size;
    enter(w);
  }

  void next(const Lut4Weight& w) {
    first += kWindow;
    enter(w);
  }

 private:
  void enter(const Lut4Weight& w) {
    const int64_t columns = first < w.K ? min_of(kWindow, w.K - first) : 0;
    inside = __mmask32((uint64_t(1) << columns / 4) - 1);
    for (int64_t i = 0; i < kBooks; ++i) {
      groups[i] = group_;
      in_group_ += kColumns;
      // Beyond K the last group goes on.
      if (in_group_ == w.group_size && first + (i + 1) * kColumns < w.K) ++group_, in_group_ = 0;
    }
  }

  int64_t group_, in_group_;
};

// A row's codes of a window, and its scaled and rounded books of the window's groups.
template <bool HALVES>
struct WindowRow {
  __m512i codes, low, high;

  void load(const Lut4Weight& w, const Window<HALVES>& window, const uint8_t* row,
            const RowBooks& books) {
    codes = _mm512_maskz_loadu_epi16(window.inside, row + window.first / 2);
    const auto pair = [&](int i) {
      const Vec a = books.at(window.groups[i], w.book_group_stride).entries;
      const Vec b = books.at(window.groups[i + 1], w.book_group_stride).entries;
      return (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    };
    low = pair(0);
    if constexpr (!HALVES) high = pair(2);
  }

  // The next of the four vectors.
  __m512i next(const Window<HALVES>& window) {
    // (codes & 15) | book_bits
    const __m512i index =
        _mm512_ternarylogic_epi64(codes, _mm512_set1_epi16(15), window.book_bits, 0xea);
    codes = _mm512_srli_epi16(codes, 4);
    if constexpr (HALVES) return _mm512_maskz_permutexvar_epi16(window.inside, index, low);
    return _mm512_maskz_permutex2var_epi16(window.inside, low, index, high);
  }
};

inline Vec dot(Vec sum, __m512i w, __m512i x) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
}

// Sum of the lanes, halves added to halves.
inline float sum_of_lanes(Vec v) {
  typedef float Half __attribute__((vector_size(32)));
  typedef float Quarter __attribute__((vector_size(16)));
  Half halves[2];
  memcpy(halves, &v, sizeof v);
  const Half half = halves[0] + halves[1];
  Quarter quarters[2];
  memcpy(quarters, &half, sizeof half);
  const Quarter q = quarters[0] + quarters[1];
  return (q[0] + q[2]) + (q[1] + q[3]);
}

// --- few rows of x ---

// Most rows of x for which looking codes up again for every kFewCols of them is cheaper than
// expanding w.
constexpr int64_t kFewBf16 = 12;
// Distance of prefetched codes, at least.
constexpr int64_t kBytesAhead = 12288;
// Rows of w that share the loads of x.
constexpr int kSharingBf16 = 2;

// sums[c * kFewBlock + r] = sum_k x[c, k] * w[r, k]; rows of x lie `x_stride` words apart.
template <int C, bool HALVES>
void dot_rows_bf16(const Lut4Weight& w, const Rows& rows, const uint16_t* x, int64_t x_stride,
                   int64_t ahead, float* sums) {
  constexpr int R = kSharingBf16;
  const uint8_t* codes[R];
  RowBooks books[R];
  for (int r = 0; r < R; ++r) {
    codes[r] = rows.codes(r);
    books[r] = rows.books(r);
  }
  Vec acc[R][C][2] = {};  // of even and of odd vectors: a dot product waits for the one before
  for (Window<HALVES> window(w, 0); window.first < w.K; window.next(w)) {
    WindowRow<HALVES> row[R];
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(codes[r] + window.first / 2 + ahead, 0, 2);
      row[r].load(w, window, codes[r], books[r]);
    }
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v) {
      __m512i values[R];
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) values[r] = row[r].next(window);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const __m512i columns = _mm512_load_si512(x + c * x_stride + window.first + v * kWords);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) acc[r][c][v % 2] = dot(acc[r][c][v % 2], values[r], columns);
      }
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sums[c * kFewBlock + r] = sum_of_lanes(acc[r][c][0] + acc[r][c][1]);
}

// The only book of a weight in bfloat16, times the fraction at which the rounding errors of its
// entries are least. Of sixteen fixed entries some fraction always suits most: for NF4 the error
// is under half of that which the rounding of every scaled entry makes, and FP4 becomes exact.
struct RoundedBook {
  __m512i table;   // twice the same entries: the fifth bit of an index does not matter
  float restored;  // what a sum of products with the table is multiplied with

  explicit RoundedBook(const float* codebook) {
    constexpr int kFractions = 32;
    const Vec entries = load(codebook);
    float least = INFINITY;
    for (int i = 0; i < kFractions; ++i) {
      const float fraction = 1 - i / (2.f * kFractions);
      const __m512 scaled = (__m512)(entries * fraction);
      const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(scaled, scaled);
      const __m512i bits =
          _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(rounded)), 16);
      const Vec error = (Vec)bits / fraction - entries;
      const float sum = sum_of_lanes(error * error);
      if (i > 0 && !(sum < least)) continue;
      least = sum;
      table = rounded;
      restored = 1 / fraction;
    }
  }

  // Whether a weight can be read so: its windows must be whole and their halves in one group.
  static bool suits(const Lut4Weight& w) {
    return w.book_row_stride == 0 && w.book_group_stride == 0 &&
           w.group_size % (kWindow / 2) == 0 && w.K % kWindow == 0;
  }
};

// dot_rows_bf16 with the rounded book for all groups, whose sums are scaled instead of the books.
template <int C>
void dot_rows_one_book(const Lut4Weight& w, const Rows& rows, const RoundedBook& book,
                       const uint16_t* x, int64_t x_stride, int64_t ahead, float* sums) {
  constexpr int R = kSharingBf16;
  const uint8_t* codes[R];
  const float* scales[R];
  for (int r = 0; r < R; ++r) {
    codes[r] = rows.codes(r);
    scales[r] = rows.books(r).scales;
  }
  Vec acc[R][C] = {};
  for (Window<true> window(w, 0); window.first < w.K; window.next(w)) {
    Vec part[R][C] = {};
    __m512i words[R];
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(codes[r] + window.first / 2 + ahead, 0, 2);
      words[r] = _mm512_loadu_si512(codes[r] + window.first / 2);
    }
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v) {
      __m512i values[R];
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        values[r] = _mm512_permutexvar_epi16(words[r], book.table);
        words[r] = _mm512_srli_epi16(words[r], 4);
      }
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const __m512i columns = _mm512_load_si512(x + c * x_stride + window.first + v * kWords);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) part[r][c] = dot(part[r][c], values[r], columns);
      }
    }
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      // The upper lanes summed the upper half of the window.
      const Vec scale =
          (Vec)_mm512_mask_blend_ps(0xff00, _mm512_set1_ps(scales[r][window.groups[0]]),
                                    _mm512_set1_ps(scales[r][window.groups[1]]));
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] += scale * part[r][c];
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sums[c * kFewBlock + r] = sum_of_lanes(acc[r][c]) * book.restored;
}

// What all passes over a weight share.
struct FewBf16 {
  const Lut4GemmParams& p;
  const uint16_t* x;  // [M, x_stride], its windows in order
  int64_t x_stride;
  int64_t ahead;  // to the rows of a later pass, which follow in memory: on their way into L2
  bool one_book;
  RoundedBook book;

  FewBf16(const Lut4GemmParams& p, const uint16_t* x, int64_t x_stride)
      : p(p),
        x(x),
        x_stride(x_stride),
        ahead(ceil_div(kBytesAhead, kSharingBf16 * (p.w.K / 2)) * kSharingBf16 * (p.w.K / 2)),
        one_book(RoundedBook::suits(p.w)),
        book(p.w.codebook) {}
};

// Outputs [m0, m0 + C) x [n0, last).
template <int C>
void multiply_few_bf16(const FewBf16& few, float* scratch, int64_t m0, int64_t n0, int64_t last) {
  constexpr int R = kSharingBf16;
  const Lut4Weight& w = few.p.w;
  const uint16_t* x = few.x + m0 * few.x_stride;
  Rows rows(w, scratch, R);
  static_assert(kFewBlock % R == 0, "a block is made of whole passes");
  float block[C * kFewBlock];
  for (int64_t n = n0; n < last; n += R) {
    rows.load(n, R);
    float* sums = block + n - n0;
    if (few.one_book)
      dot_rows_one_book<C>(w, rows, few.book, x, few.x_stride, few.ahead, sums);
    else if (w.group_size % 64 == 0)
      dot_rows_bf16<C, true>(w, rows, x, few.x_stride, few.ahead, sums);
    else
      dot_rows_bf16<C, false>(w, rows, x, few.x_stride, few.ahead, sums);
  }
  for (int c = 0; c < C; ++c) store_outputs(few.p, m0 + c, n0, last - n0, block + c * kFewBlock, 1);
}

void multiply_few_bf16(const Lut4GemmParams& p) {
  const int64_t N = p.w.N, K = p.w.K, blocks = ceil_div(N, kFewBlock);
  const int64_t x_stride = ceil_div(K, kWindow) * kWindow, x_floats = padded(p.M * x_stride / 2);
  const int64_t floats = Rows::scratch_floats(p.w, kSharingBf16);
  const bool parallel = p.M * N * K >= kParallelWork;
  const Buffer<float> buffer(x_floats + floats * (parallel ? omp_get_max_threads() : 1));
  uint16_t* x = reinterpret_cast<uint16_t*>(buffer.data());
  for (int64_t m = 0; m < p.M; ++m)
    for (int64_t k = 0; k < K; k += kWindow)
      order_window(static_cast<const uint16_t*>(p.x) + m * p.x_stride + k, K - k,
                   x + m * x_stride + k);
  const FewBf16 few(p, x, x_stride);
  const int64_t passes = ceil_div(p.M, kFewCols);
  Shares shares(blocks, parallel ? omp_get_max_threads() : 1);
#pragma omp parallel if (parallel)
  for (int64_t i; (i = shares.next(omp_get_thread_num())) >= 0;) {
    float* scratch = buffer.data() + x_floats + floats * omp_get_thread_num();
    const int64_t n0 = i * kFewBlock, last = min_of(N, n0 + kFewBlock);
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t m = pass * p.M / passes, count = (pass + 1) * p.M / passes - m;
      if (count == 1) multiply_few_bf16<1>(few, scratch, m, n0, last);
      if (count == 2) multiply_few_bf16<2>(few, scratch, m, n0, last);
      if (count == 3) multiply_few_bf16<3>(few, scratch, m, n0, last);
      if (count == 4) multiply_few_bf16<4>(few, scratch, m, n0, last);
    }
  }
}

// --- many rows of x ---

constexpr int64_t kStripBf16 = 16;
// Rows of x that pass over an expanded block together: their sums stay in L2.
constexpr int64_t kPanelBf16 = 256;
// Columns expanded at a time, of kBlock rows, and their distance: off the powers of two that would
// crowd a few sets of L1.
constexpr int64_t kColumnsBf16 = 4 * kWindow, kExpandedBf16 = kColumnsBf16 + kWords;
// Rows of w per pass over V strips: their 24 sums, the strips' vectors and a pair of w's columns
// fill the registers.
template <int V>
constexpr int kTileBf16 = 24 / V;
static_assert(kBlock % 24 == 0, "a block is made of whole tiles");

// A window of rows [m0, m0 + rows) of x as its part of a strip: [64 pairs of columns][16 rows][2].
inline void pair_window(const Lut4GemmParams& p, int64_t m0, int64_t rows, int64_t k,
                        int32_t* out) {
  alignas(64) int32_t pairs[kStripBf16][kWindow / 2];
  memset(pairs, 0, sizeof pairs);
  for (int64_t m = 0; m < min_of(rows, kStripBf16); ++m)
    order_window(static_cast<const uint16_t*>(p.x) + (m0 + m) * p.x_stride + k, p.w.K - k,
                 reinterpret_cast<uint16_t*>(pairs[m]));
  for (int64_t i = 0; i < kWindow / 2; ++i)
    for (int64_t m = 0; m < kStripBf16; ++m) out[i * kStripBf16 + m] = pairs[m][i];
}

// Columns `first` .. `last` - 1 of the block's rows.
template <bool HALVES>
void expand(const Lut4Weight& w, const Rows& rows, int64_t first, int64_t last, uint16_t* out) {
  for (Window<HALVES> window(w, first); window.first < last; window.next(w)) {
    for (int64_t r = 0; r < kBlock; ++r) {
      const uint8_t* codes = rows.codes(r);
      // What the next call expands: so many rows are too many streams for the hardware.
      __builtin_prefetch(codes + (window.first + kColumnsBf16) / 2, 0, 2);
      WindowRow<HALVES> row;
      row.load(w, window, codes, rows.books(r));
      uint16_t* to = out + r * kExpandedBf16 + window.first - first;
#pragma GCC unroll 4
      for (int64_t v = 0; v < kVectors; ++v) _mm512_store_si512(to + v * kWords, row.next(window));
    }
  }
}

// c[v][j] += sum over `pairs` of w[j] * x[v], 16 rows of x each; strips of x lie x_next dwords
// apart
template <int V>
inline void multiply_tile_bf16(int64_t pairs, const uint16_t* w, const int32_t* x, int64_t x_next,
                               float* c) {
  constexpr int J = kTileBf16<V>;
  Vec acc[J][V] = {};
  for (int64_t i = 0; i < pairs; ++i, x += kStripBf16, w += 2) {
    __m512i columns[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) columns[v] = _mm512_load_si512(x + v * x_next);
#pragma GCC unroll 24
    for (int j = 0; j < J; ++j) {
      int32_t pair;
      memcpy(&pair, w + j * kExpandedBf16, 4);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[j][v] = dot(acc[j][v], columns[v], _mm512_set1_epi32(pair));
    }
  }
#pragma GCC unroll 24
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* sum = c + (v * kBlock + j) * kStripBf16;
      store(sum, load(sum) + acc[j][v]);
    }
}

template <int V>
inline void multiply_strips_bf16(int64_t pairs, const uint16_t* w, const int32_t* x, int64_t x_next,
                                 float* c) {
  for (int64_t j = 0; j < kBlock; j += kTileBf16<V>)
    multiply_tile_bf16<V>(pairs, w + j * kExpandedBf16, x, x_next, c + j * kStripBf16);
}

// Output columns n0 .. n0 + kBlock - 1 of `rows` rows from m0 on, whose strips of x_next dwords are
// at x.
void multiply_block_bf16(const Lut4GemmParams& p, const int32_t* x, int64_t x_next, float* scratch,
                         int64_t m0, int64_t rows, int64_t n0) {
  alignas(64) float sums[kPanelBf16 * kBlock];  // [strips][kBlock][kStripBf16]
  alignas(64) uint16_t expanded[kBlock * kExpandedBf16];
  const int64_t strips = ceil_div(rows, kStripBf16), passes = ceil_div(strips, 4);
  memset(sums, 0, strips * kBlock * kStripBf16 * sizeof(float));
  Rows w(p.w, scratch, kBlock);
  w.load(n0, kBlock);
  for (int64_t r = 0; r < kBlock; ++r)
    for (int64_t k = 0; k < kColumnsBf16; k += kWindow)
      __builtin_prefetch(w.codes(r) + k / 2, 0, 2);
  for (int64_t first = 0; first < p.w.K; first += kColumnsBf16) {
    const int64_t last = min_of(p.w.K, first + kColumnsBf16);
    const int64_t pairs = ceil_div(last - first, kWindow) * kWindow / 2;
    if (p.w.group_size % 64 == 0)
      expand<true>(p.w, w, first, last, expanded);
    else
      expand<false>(p.w, w, first, last, expanded);
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t s = pass * strips / passes, count = (pass + 1) * strips / passes - s;
      const int32_t* at = x + s * x_next + first / 2 * kStripBf16;
      float* c = sums + s * kBlock * kStripBf16;
      if (count == 1) multiply_strips_bf16<1>(pairs, expanded, at, x_next, c);
      if (count == 2) multiply_strips_bf16<2>(pairs, expanded, at, x_next, c);
      if (count == 3) multiply_strips_bf16<3>(pairs, expanded, at, x_next, c);
      if (count == 4) multiply_strips_bf16<4>(pairs, expanded, at, x_next, c);
    }
  }
  for (int64_t m = 0; m < rows; ++m)
    store_outputs(p, m0 + m, n0, min_of(kBlock, p.w.N - n0),
                  sums + m / kStripBf16 * kBlock * kStripBf16 + m % kStripBf16, kStripBf16);
}

void multiply_many_bf16(const Lut4GemmParams& p) {
  const int64_t N = p.w.N, K = p.w.K, blocks = ceil_div(N, kBlock), windows = ceil_div(K, kWindow);
  const int64_t x_next = windows * kWindow / 2 * kStripBf16;
  const int64_t x_dwords = ceil_div(min_of(p.M, kPanelBf16), kStripBf16) * x_next;
  const int64_t floats = Rows::scratch_floats(p.w, kBlock);
  const Buffer<float> buffer(x_dwords + floats * omp_get_max_threads());
  int32_t* x = reinterpret_cast<int32_t*>(buffer.data());
  for (int64_t m0 = 0; m0 < p.M; m0 += kPanelBf16) {
    const int64_t rows = min_of(kPanelBf16, p.M - m0), strips = ceil_div(rows, kStripBf16);
#pragma omp parallel for schedule(static) if (rows * K >= kParallelElements)
    for (int64_t i = 0; i < strips * windows; ++i) {
      const int64_t m = i / windows * kStripBf16, window = i % windows;
      pair_window(p, m0 + m, rows - m, window * kWindow,
                  x + i / windows * x_next + window * kWindow / 2 * kStripBf16);
    }
#pragma omp parallel for schedule(dynamic) if (rows * N * K >= kParallelWork)
    for (int64_t i = 0; i < blocks; ++i)
      multiply_block_bf16(p, x, x_next, buffer.data() + x_dwords + floats * omp_get_thread_num(),
                          m0, rows, i * kBlock);
  }
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
#endif
