// out[n, k] = scales[n, k / group_size] * (codes[n, k] - zeros[n, k / group_size])
#include "int4_tile.h"
#include "kernels.h"

namespace llmkern::LLMKERN_ISA {
namespace {

// One row of a tile: the row's nibble of each byte, four columns per dword.
void dequantize_row(const Tile& tile, int64_t row, int64_t columns, float* out) {
  const int64_t dword = row / 32 * 16 + row % 16;
  const int shift = row % 32 < 16 ? 0 : 4;
  alignas(64) uint8_t codes[kMaxChunk];
  for (int64_t q = 0; q < columns / 4; ++q) {
    uint32_t word;
    memcpy(&word, tile.qweight + q * kQuadBytes + dword * 4, 4);
    word = word >> shift & 0x0f0f0f0f;
    memcpy(codes + 4 * q, &word, 4);
  }
  const float scale = tile.scales[row];
  const int32_t zero = tile.zeros[row];
  for (int64_t k = 0; k < columns; ++k) out[k] = scale * float(codes[k] - zero);
}

}  // namespace

void dequantize_int4(const DequantizeInt4Params& p) {
  const Int4Weight& w = p.w;
  const int64_t columns = chunk_columns(w.group_size);
#pragma omp parallel for schedule(dynamic) if (w.N * w.K >= 1 << 17)
  for (int64_t n0 = 0; n0 < w.N; n0 += kBlock) {
    Tile tile;
    alignas(64) float values[kMaxChunk];
    start_block(w, n0, tile);
    for (int64_t k0 = 0; k0 < w.K; k0 += columns) {
      load_tile(w, n0, k0, columns, tile);
      for (int64_t row = 0; row < min_of(kBlock, w.N - n0); ++row) {
        dequantize_row(tile, row, columns, values);
        from_float(values, columns, p.dtype, p.out, (n0 + row) * w.K + k0);
      }
    }
  }
}

}  // namespace llmkern::LLMKERN_ISA
