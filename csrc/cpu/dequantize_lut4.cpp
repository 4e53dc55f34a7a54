// out[n, k] = scales[n, k / group_size] * codebook[.., codes[n, k]]
#include <omp.h>

#include "kernels.h"
#include "lut4_rows.h"

namespace llmkern::LLMKERN_ISA {

void dequantize_lut4(const DequantizeLut4Params& p) {
  const Lut4Weight& w = p.w;
  const int64_t floats = Rows::scratch_floats(w, 1) + w.K;
  const bool parallel = w.N * w.K >= 1 << 17;
  const Buffer<float> buffer(floats * (parallel ? omp_get_max_threads() : 1));
#pragma omp parallel for schedule(static) if (parallel)
  for (int64_t n = 0; n < w.N; ++n) {
    float* values = buffer.data() + floats * omp_get_thread_num();
    Rows rows(w, values + w.K, 1);
    rows.load(n, 1);
    rows.dequantize(0, 0, w.K, values);
    from_float(values, w.K, p.dtype, p.out, n * w.K);
  }
}

}  // namespace llmkern::LLMKERN_ISA
