// ldmatrix, mma.sync and mma.sp on the host. Fragments are as in the PTX ISA, "Matrix fragments for
// mma.m16n8k16" and "Sparse matrix storage": with g = lane / 4 and t = lane % 4, registers of two
// 16-bit elements hold
//   a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)      b: (2t, g), (2t + 8, g), ...
//   d (float): (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)

#include <cmath>
#include <cstring>
#include <vector>

#include "emu/internal.h"
#include "emu/ptx.h"

namespace llmkern::emu {
namespace {

constexpr uint32_t kAllLanes = 0xffffffffu;

struct MatrixLoad {
  const void* row;
  uint32_t* r;
  int matrices;
  bool transposed;
};

void run_ldmatrix(void* const* args, uint32_t) {
  const auto& first = *static_cast<const MatrixLoad*>(args[0]);
  for (int i = 0; i < first.matrices; i++) {
    uint16_t matrix[8][8];
    for (int j = 0; j < 8; j++)
      std::memcpy(matrix[j], static_cast<const MatrixLoad*>(args[8 * i + j])->row, 16);
    for (int lane = 0; lane < 32; lane++) {
      const int g = lane / 4, t = lane % 4 * 2;
      const uint32_t low = first.transposed ? matrix[t][g] : matrix[g][t];
      const uint32_t high = first.transposed ? matrix[t + 1][g] : matrix[g][t + 1];
      static_cast<const MatrixLoad*>(args[lane])->r[i] = low | high << 16;
    }
  }
}

float half_value(uint16_t bits) {
  static const std::vector<float> table = [] {
    std::vector<float> values(1 << 16);
    for (size_t i = 0; i < values.size(); i++)
      values[i] = __half2float(__half{static_cast<uint16_t>(i)});
    return values;
  }();
  return table[bits];
}

// The two elements of a register.
void widen(uint32_t pair, bool bfloat16, float& low, float& high) {
  const auto value = [bfloat16](uint32_t bits) {
    const auto half = static_cast<uint16_t>(bits);
    return bfloat16 ? __bfloat162float(__nv_bfloat16{half}) : half_value(half);
  };
  low = value(pair);
  high = value(pair >> 16);
}

float toward_zero(double v) {
  const auto f = static_cast<float>(v);
  if (std::isinf(f) || std::fabs(f) <= std::fabs(v)) return f;
  return std::nextafter(f, 0.0f);
}

// A 16 x 16 operand whose element (i, j) multiplies row index[i][j] of b: all 16 columns of the
// dense instruction, the kept half of 32 of the sparse one.
struct Product {
  float a[16][16], b[32][8];
  uint8_t index[16][16];

  Product(void* const* args, int b_registers) {
    for (int lane = 0; lane < 32; lane++) {
      const auto& mine = *static_cast<const MmaOperands*>(args[lane]);
      const int g = lane / 4, t = lane % 4 * 2;
      for (int i = 0; i < 4; i++) {
        float* to = &a[g + i % 2 * 8][t + i / 2 * 8];
        widen(mine.a[i], mine.bfloat16, to[0], to[1]);
      }
      for (int i = 0; i < b_registers; i++)
        widen(mine.b[i], mine.bfloat16, b[t + 8 * i][g], b[t + 8 * i + 1][g]);
    }
  }

  // d += a * b. How a tensor core rounds is not specified. Here eight products at a time are added
  // to the accumulator as if exactly and the sum is cut off to float32, which is how Ampere and
  // Hopper have been found to behave (Fasi et al., 2021, "Numerical behavior of NVIDIA tensor
  // cores"), but for the few low bits that they drop when they align the products.
  void add_to_d(void* const* args) const {
    for (int lane = 0; lane < 32; lane++) {
      float* d = static_cast<const MmaOperands*>(args[lane])->d;
      for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int half = 0; half < 16; half += 8) {
          double sum = d[i];
          for (int j = half; j < half + 8; j++) sum += double{a[row][j]} * b[index[row][j]][column];
          d[i] = toward_zero(sum);
        }
      }
    }
  }
};

void run_mma(void* const* args, uint32_t) {
  Product product(args, 2);
  for (auto& row : product.index)
    for (uint8_t j = 0; j < 16; j++) row[j] = j;
  product.add_to_d(args);
}

// Lanes 4g + 2 * selector and the one after it hold the metadata of row g (low half) and g + 8
// (high half), the first of k 0..15, the second of k 16..31: a nibble per four k, first kept index
// below the second.
void run_mma_sparse(void* const* args, uint32_t) {
  Product product(args, 4);
  for (int row = 0; row < 16; row++)
    for (int four = 0; four < 8; four++) {
      const int lane = row % 8 * 4 + four / 4;
      const auto& first = *static_cast<const MmaOperands*>(args[lane]);
      const auto& mine = *static_cast<const MmaOperands*>(args[lane + 2 * first.selector]);
      const uint32_t nibble = mine.metadata >> (row / 8 * 16 + four % 4 * 4);
      product.index[row][2 * four] = static_cast<uint8_t>(4 * four + (nibble & 3));
      product.index[row][2 * four + 1] = static_cast<uint8_t>(4 * four + (nibble >> 2 & 3));
    }
  product.add_to_d(args);
}

}  // namespace

void ldmatrix(uint32_t* r, int matrices, bool transposed, const void* row, Site site) {
  if (lane() < 8 * matrices) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
      fail("ldmatrix: a row is not 16-byte aligned", site);
    if (!find_array(*running->block, row, 16))
      fail("ldmatrix: a row is not within one shared array of the block", site);
  }
  MatrixLoad mine = {row, r, matrices, transposed};
  warp_operation(kAllLanes, site, run_ldmatrix, &mine);
  for (int i = 0; i < matrices; i++)
    if (r[i] == kPoisonWord) fail("ldmatrix: read of shared memory that nobody wrote", site);
}

void mma(MmaOperands operands, Site site) { warp_operation(kAllLanes, site, run_mma, &operands); }

void mma_sparse(MmaOperands operands, Site site) {
  if (lane() % 4 / 2 == operands.selector)
    for (int bit = 0; bit < 32; bit += 4) {
      const uint32_t first = operands.metadata >> bit & 3,
                     second = operands.metadata >> bit >> 2 & 3;
      if (first >= second) fail("mma.sp: metadata that do not name two of four in order", site);
    }
  warp_operation(kAllLanes, site, run_mma_sparse, &operands);
}

}  // namespace llmkern::emu
