// out[m, n] = sum_k x[m, k] * w[n, k] + bias[n], w = scales * (codes - zeros) for two of every 4
// columns, else 0
//
// 3 bits are read per weight, and scales. A code minus its zero point is an exact integer, the
// products are exact or rounded to float32, and a group's sum is scaled at the end; how they are
// formed is in sparse24_block.h. bfloat16 x is multiplied by vdpbf16ps where that exists and there
// are no zero points.
#include "kernels.h"
#include "sparse24_run.h"

namespace llmkern::LLMKERN_ISA {
namespace {

template <bool kZeros>
class CodeReader {
 public:
  using Weight = Codes<kZeros>;

  explicit CodeReader(const Sparse24W4A16GemmParams& p) : p_(p) {}

  // Columns per panel: a divisor of the group, so that a panel has one scale per row.
  int64_t columns() const {
    int64_t columns = kPanelCols;
    while (p_.group_size % columns) columns -= kWordCols;
    return columns;
  }

  int64_t scratch_floats(int64_t blocks) const {
    const int64_t own = p_.layout == Layout::kCpu ? 0 : kBlockWords;
    return blocks * (2 * kBlockRows + own);
  }

  void load(int64_t first, int64_t count, int64_t k, int64_t words, void* scratch,
            Weight* blocks) const {
    float* scales = static_cast<float*>(scratch);
    float* zeros = scales + count * kBlockRows;
    load_grids(first * kBlockRows, count * kBlockRows, k / p_.group_size, scales, zeros);
    int32_t* own = reinterpret_cast<int32_t*>(zeros + count * kBlockRows);
    for (int64_t b = 0; b < count; ++b) {
      const int32_t *codes, *meta;
      if (p_.layout == Layout::kCpu) {
        const int64_t word = (first + b) * (p_.K / kWordCols) + k / kWordCols;
        codes = static_cast<const int32_t*>(p_.qvalues) + 2 * word * kBlockRows;
        meta = static_cast<const int32_t*>(p_.meta) + word * kBlockRows;
        // Beyond the reach of the hardware prefetcher, which has many short streams to follow here.
        const int64_t ahead = words_ahead(k, count);
        for (int64_t i = ahead; i < ahead + words; ++i) {
          __builtin_prefetch(codes + 2 * i * kBlockRows, 0, 2);
          __builtin_prefetch(codes + (2 * i + 1) * kBlockRows, 0, 2);
          __builtin_prefetch(meta + i * kBlockRows, 0, 2);
        }
      } else {
        int32_t* block = own + b * kBlockWords;
        repack(first + b, k, words, block);
        repack_meta(p_.meta, p_.N, p_.K, (first + b) * kBlockRows, k, words,
                    block + 2 * kPanelWords * kBlockRows);
        codes = block;
        meta = block + 2 * kPanelWords * kBlockRows;
      }
      blocks[b] = {codes, meta, scales + b * kBlockRows, zeros + b * kBlockRows};
    }
  }

 private:
  static constexpr int64_t kBlockWords = 3 * kPanelWords * kBlockRows;
  static constexpr int64_t kWordsAhead = 32;  // of metadata: 4 KB of codes

  // From column k of a block, in a strip of `count`, to what its thread reads kWordsAhead later:
  // beyond the end of the rows, the same block of the next strip.
  int64_t words_ahead(int64_t k, int64_t count) const {
    const int64_t words = p_.K / kWordCols;
    return kWordsAhead + (k / kWordCols + kWordsAhead < words ? 0 : (count - 1) * words);
  }

  // Scales and zero points of some rows; scale 0 beyond N.
  void load_grids(int64_t n0, int64_t rows, int64_t group, float* scales, float* zeros) const {
    if (p_.layout == Layout::kCpu) {
      const int64_t at = group * p_.N + n0;
      // The next groups' scales lie rows of N further, where no hardware prefetcher looks; those of
      // the very next group are wanted too soon.
      const int64_t bytes = p_.scales_dtype == DType::kFloat32 ? 4 : 2;
      const char* next = static_cast<const char*>(p_.scales) + (at + 2 * p_.N) * bytes;
      for (int64_t line = 0; line < rows * bytes; line += 64) __builtin_prefetch(next + line);
      to_float(p_.scales, at, p_.scales_dtype, rows, scales);
      if (kZeros)
        for (int64_t r = 0; r < rows; ++r) zeros[r] = static_cast<const uint8_t*>(p_.zeros)[at + r];
      return;
    }
    const int64_t groups = p_.K / p_.group_size;
    memset(scales, 0, rows * sizeof(float));
    memset(zeros, 0, rows * sizeof(float));
    for (int64_t r = 0; r < min_of(rows, p_.N - n0); ++r) {
      const int64_t n = n0 + r;
      to_float(p_.scales, n * groups + group, p_.scales_dtype, 1, scales + r);
      if (kZeros) {
        const int32_t word = static_cast<const int32_t*>(p_.zeros)[n / 8 * groups + group];
        zeros[r] = float(uint32_t(word) >> (4 * (n % 8)) & 15);
      }
    }
  }

  // Words of 8 codes, even ones to the low half and odd ones to the high half.
  void repack(int64_t block, int64_t k, int64_t words, int32_t* out) const {
    for (int64_t r = 0; r < kBlockRows; ++r) {
      const int64_t n = block * kBlockRows + r;
      for (int64_t i = 0; i < 2 * words; ++i) {
        uint32_t word = 0;
        if (n < p_.N) {
          const uint32_t codes =
              uint32_t(static_cast<const int32_t*>(p_.qvalues)[n * (p_.K / 16) + k / 16 + i]);
          for (int j = 0; j < 4; ++j)
            word |= (codes >> (8 * j) & 15) << (4 * j) | (codes >> (8 * j + 4) & 15)
                                                             << (4 * j + 16);
        }
        out[i * kBlockRows + r] = int32_t(word);
      }
    }
  }

  const Sparse24W4A16GemmParams& p_;
};

}  // namespace

void sparse24_w4a16_gemm(const Sparse24W4A16GemmParams& p) {
  const Product product = {p.x, p.bias, p.out, p.M, p.N, p.K, p.x_stride, p.dtype};
  if (p.zeros) return multiply<Floats>(product, CodeReader<true>(p));
#ifdef __AVX512BF16__
  if (p.dtype == DType::kBFloat16) return multiply<Halves>(product, CodeReader<false>(p));
#endif
  multiply<Floats>(product, CodeReader<false>(p));
}

}  // namespace llmkern::LLMKERN_ISA
