// dequantize_int4: w[n, k] = scales[n, g] * (codes[n, k] - zeros[n, g]), g = k / group_size.
//
// Bound by memory: 0.5 byte read and one element written per weight. A thread unpacks one word,
// eight codes, and stores them in 16-byte pieces; a CTA covers 2048 columns of one row, so that no
// thread divides by K. Layout: llmkern/formats/int4.py.
//
// Not yet run on a GPU: tested in the emulator (csrc/emu) and compiled ahead of time only.

#include "cuda/common/dtype.cuh"
#include "cuda/common/int4.cuh"
#include "cuda/common/launch.h"
#include "cuda/kernels.h"

namespace llmkern::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_int4_kernel(const DequantizeInt4Params p, const unsigned ctas_per_row) {
  const Int4Weight& w = p.w;
  const int64_t words = w.K / 8;
  const int64_t n = blockIdx.x / ctas_per_row;
  const int64_t word = static_cast<int64_t>(blockIdx.x % ctas_per_row) * kThreads + threadIdx.x;
  if (word >= words) return;
  const GroupGrid grid = load_grid(w, n, word * 8 / w.group_size);
  float value[8];
  unpack8(static_cast<const uint32_t*>(w.qweight)[n * words + word], grid.zero, value);
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
