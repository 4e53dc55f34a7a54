// dequantize_int4: w[n, k] = scales[n, g] * (codes[n, k] - zeros[n, g]), g = k / group_size.
//
// Bound by memory: 0.5 byte read and one element written per weight. A thread unpacks one word,
// eight codes, and stores them in 16-byte pieces; a CTA covers 2048 columns of one row, so that no
// thread divides by K. Layouts:
// llmkern/formats/int4.py and int4_cuda.py.
//
// Not yet run on a GPU: tested in the emulator (csrc/emu) and compiled ahead of time only.

#include "cuda/common/dequant.cuh"
#include "cuda/common/dtype.cuh"
#include "cuda/common/int4.cuh"
#include "cuda/common/launch.h"
#include "cuda/kernels.h"

namespace llmkern::cuda {
namespace {

constexpr int kThreads = 256;

// Columns k .. k + 7 of row n of a weight in the CUDA layout: code - zero, and their scale. The
// eight are two of the values of each of four lanes' words.
__device__ __forceinline__ GroupGrid read_chunk(const Int4Weight& w, int64_t n, int64_t k,
                                                float (&value)[8]) {
  const Int4Chunks shape = int4_chunks(w);
  const int row = static_cast<int>(n % kChunkRows), column = static_cast<int>(k % kChunkColumns);
  const auto* chunk = static_cast<const unsigned char*>(w.qweight) +
                      (n / kChunkRows * shape.per_row + k / kChunkColumns) * shape.bytes;
  const int at = column / shape.group_size * kChunkRows + grid_index(row);
  GroupGrid grid = {load_as(chunk + kCodeBytes, at, w.scales_dtype), 8.0f};
  if (w.zeros) grid.zero = static_cast<float>(chunk[shape.zeros_at + at]);
  const int step = column / 16, pair = row % 16 / 8 + column % 16 / 8 * 2;
  const auto* words = reinterpret_cast<const uint32_t*>(chunk) +
                      ((step / 4 * 4 + row / 16) * 32 + row % 8 * 4) * 4 + step % 4;
#pragma unroll
  for (int t = 0; t < 4; t++) {
    const uint32_t shifted = words[t * 4] >> (4 * pair);
    value[2 * t] = static_cast<float>(shifted & 15) - grid.zero;
    value[2 * t + 1] = static_cast<float>(shifted >> 16 & 15) - grid.zero;
  }
  return grid;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_int4_kernel(const DequantizeInt4Params p, const unsigned ctas_per_row) {
  const Int4Weight& w = p.w;
  const int64_t words = w.K / 8;
  const int64_t n = blockIdx.x / ctas_per_row;
  const int64_t word = static_cast<int64_t>(blockIdx.x % ctas_per_row) * kThreads + threadIdx.x;
  if (word >= words) return;
  GroupGrid grid;
  float value[8];
  if (w.layout == Int4Layout::kCuda) {
    grid = read_chunk(w, n, word * 8, value);
  } else {
    grid = load_grid(w, n, word * 8 / w.group_size);
    unpack8(static_cast<const uint32_t*>(w.qweight)[n * words + word], grid.zero, value);
  }
  // K is a multiple of 32 and `out` is 16-byte aligned, hence so is every eighth element.
  constexpr int kPerPiece = 16 / sizeof(T);
  T* out = static_cast<T*>(p.out) + n * w.K + word * 8;
#pragma unroll
  for (int piece = 0; piece < 8 / kPerPiece; piece++) {
    Bytes16 packed;
#pragma unroll
    for (int i = 0; i < kPerPiece; i++)
      store(reinterpret_cast<T*>(&packed) + i, grid.scale * value[piece * kPerPiece + i]);
    reinterpret_cast<Bytes16*>(out)[piece] = packed;
  }
}

}  // namespace

void dequantize_int4(const DequantizeInt4Params& p, void* stream) {
  const int64_t ctas_per_row = ceil_div(p.w.K / 8, kThreads);
  dispatch(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch("dequantize_int4", dequantize_int4_kernel<T>, p.w.N * ctas_per_row, kThreads, stream, p,
           static_cast<unsigned>(ctas_per_row));
  });
}

}  // namespace llmkern::cuda
