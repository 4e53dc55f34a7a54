// out[m, n] = sum_k x[m, k] * w[n, k] + bias[n], w zero but for two of every 4 columns
//
// Only what is stored is read: 0.5625 of a dense 16-bit weight's bytes, 0.53 of a float32 one's.
// The products are exact and are summed in float32; how is in sparse24_block.h.
#include <type_traits>

#include "kernels.h"
#include "sparse24_run.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr bool kPairs(DType type) { return type == DType::kBFloat16; }

template <DType kType>
class ValueReader {
 public:
  using Weight = Values<kType>;

  explicit ValueReader(const Sparse24GemmParams& p) : p_(p) {}

  static int64_t columns() { return kPanelCols; }

  int64_t scratch_floats(int64_t blocks) const {
    return p_.layout == Layout::kCpu ? 0 : blocks * kBlockFloats;
  }

  void load(int64_t first, int64_t count, int64_t k, int64_t words, void* scratch,
            Weight* blocks) const {
    for (int64_t b = 0; b < count; ++b) {
      if (p_.layout == Layout::kCpu) {
        const int64_t word = (first + b) * (p_.K / kWordCols) + k / kWordCols;
        blocks[b] = {static_cast<const char*>(p_.values) + word * kWordBytes,
                     static_cast<const int32_t*>(p_.meta) + word * kBlockRows};
        continue;
      }
      float* own = static_cast<float*>(scratch) + b * kBlockFloats;
      int32_t* meta = reinterpret_cast<int32_t*>(own + kPanelCols / 2 * kBlockRows);
      repack(first + b, k, words, reinterpret_cast<Element*>(own));
      repack_meta(p_.meta, p_.N, p_.K, (first + b) * kBlockRows, k, words, meta);
      blocks[b] = {own, meta};
    }
  }

 private:
  using Element = std::conditional_t<kType == DType::kFloat32, float, uint16_t>;
  static constexpr int64_t kWordBytes = kWordCols / 2 * kBlockRows * sizeof(Element);
  static constexpr int64_t kBlockFloats = (kPanelCols / 2 + kPanelWords) * kBlockRows;

  void repack(int64_t block, int64_t k, int64_t words, Element* out) const {
    const int64_t groups = words * kGroups, there = min_of(groups, (p_.K - k) / 4);
    memset(out, 0, groups * 2 * kBlockRows * sizeof(Element));
    for (int64_t r = 0; r < min_of(kBlockRows, p_.N - block * kBlockRows); ++r) {
      const Element* row =
          static_cast<const Element*>(p_.values) + (block * kBlockRows + r) * (p_.K / 2) + k / 2;
      for (int64_t g = 0; g < there; ++g)
        for (int i = 0; i < 2; ++i)
          out[g * 2 * kBlockRows + (kPairs(kType) ? 2 * r + i : i * kBlockRows + r)] =
              row[2 * g + i];
    }
  }

  const Sparse24GemmParams& p_;
};

}  // namespace

void sparse24_gemm(const Sparse24GemmParams& p) {
  const Product product = {p.x, p.bias, p.out, p.M, p.N, p.K, p.x_stride, p.dtype};
  if (p.dtype == DType::kFloat32) {
    multiply<Floats>(product, ValueReader<DType::kFloat32>(p));
  } else if (p.dtype == DType::kFloat16) {
    multiply<Floats>(product, ValueReader<DType::kFloat16>(p));
  } else {
#ifdef __AVX512BF16__
    multiply<Halves>(product, ValueReader<DType::kBFloat16>(p));
#else
    multiply<Floats>(product, ValueReader<DType::kBFloat16>(p));
#endif
  }
}

}  // namespace llmkern::LLMKERN_ISA
