// One warp and one instruction each: matrix loads and products between global memory and the
// registers' layouts. For test_tensor_core.py, and for nvcc in tests/cuda/test_aot.py.

#include "cuda/common/launch.h"
#include "cuda/common/ptx.cuh"
#include "probes.h"

using namespace llmkern::cuda;

namespace {

enum LoadFault { kNoFault, kMisaligned, kNotShared, kUnwritten, kLaneMissing, kAcrossTheEnd };

// a: 32 rows of 8 elements, one per lane. out: each lane's registers.
template <int MATRICES, bool TRANSPOSED>
__global__ void load_matrices(const Probe p) {
  LLMKERN_SHARED(uint16_t, rows, [32][8]);
  const int lane = threadIdx.x;
  const auto* a = static_cast<const uint16_t*>(p.a);
  for (int i = 0; i < 8; i++)
    if (p.mode != kUnwritten || lane != 11 || i % 4 > 1) rows[lane][i] = a[lane * 8 + i];
  __syncwarp();
  const void* row = rows[lane];
  if (p.mode == kMisaligned && lane == 3) row = rows[lane] + 1;
  if (p.mode == kNotShared && lane == 3) row = a;
  if (p.mode == kAcrossTheEnd && lane == 3) row = rows[32];
  if (p.mode == kLaneMissing && lane == 3) return;
  uint32_t r[MATRICES];
  if constexpr (MATRICES == 4 && TRANSPOSED)
    ptx::ldmatrix_x4_trans(r, row);
  else if constexpr (MATRICES == 4)
    ptx::ldmatrix_x4(r, row);
  else if constexpr (TRANSPOSED)
    ptx::ldmatrix_x2_trans(r, row);
  else
    ptx::ldmatrix_x2(r, row);
  for (int i = 0; i < MATRICES; i++) static_cast<uint32_t*>(p.out)[lane * MATRICES + i] = r[i];
}

__device__ __forceinline__ uint32_t pair_at(const void* matrix, int i) {
  const auto* at = static_cast<const uint16_t*>(matrix) + i;
  return at[0] | static_cast<uint32_t>(at[1]) << 16;
}

// A register of an operand of 16 columns: rows g and g + 8, columns 2t and 2t + 8.
__device__ __forceinline__ void load_a(const void* a, uint32_t (&r)[4]) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4 * 2;
  for (int i = 0; i < 4; i++) r[i] = pair_at(a, (g + i % 2 * 8) * 16 + t + i / 2 * 8);
}

// Of b, stored [8][columns].
template <int REGISTERS>
__device__ __forceinline__ void load_b(const void* b, uint32_t (&r)[REGISTERS]) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4 * 2;
  for (int i = 0; i < REGISTERS; i++) r[i] = pair_at(b, g * 8 * REGISTERS + t + 8 * i);
}

// out[16][8] is read as the accumulator and written.
__device__ __forceinline__ float* accumulator(const Probe& p, int i) {
  const int row = threadIdx.x / 4 + i / 2 * 8, column = threadIdx.x % 4 * 2 + i % 2;
  return static_cast<float*>(p.out) + row * 8 + column;
}

// a [16][16], b [8][16].
template <typename T>
__global__ void multiply(const Probe p) {
  uint32_t a[4], b[2];
  float d[4];
  load_a(p.a, a);
  load_b(p.b, b);
  for (int i = 0; i < 4; i++) d[i] = *accumulator(p, i);
  if (p.mode == 1 && threadIdx.x == 17) return;  // a lane is missing
  ptx::mma_m16n8k16<T>(d, a, b);
  for (int i = 0; i < 4; i++) *accumulator(p, i) = d[i];
}

// a [16][16] the kept half of 32 columns, b [8][32], c each lane's metadata.
template <typename T, int SELECTOR>
__global__ void multiply_sparse(const Probe p) {
  uint32_t a[4], b[4];
  float d[4];
  load_a(p.a, a);
  load_b(p.b, b);
  for (int i = 0; i < 4; i++) d[i] = *accumulator(p, i);
  ptx::mma_sp_m16n8k32<T, SELECTOR>(d, a, b, static_cast<const uint32_t*>(p.c)[threadIdx.x]);
  for (int i = 0; i < 4; i++) *accumulator(p, i) = d[i];
}

}  // namespace

#ifdef LLMKERN_EMU
EXPORT const char* tensor_core_probe(const char* name, const Probe* probe, bool reverse) {
  static const ProbeKernel kKernels[] = {
      {"ldmatrix_x2", load_matrices<2, false>, 1, 32, {}},
      {"ldmatrix_x2_trans", load_matrices<2, true>, 1, 32, {}},
      {"ldmatrix_x4", load_matrices<4, false>, 1, 32, {}},
      {"ldmatrix_x4_trans", load_matrices<4, true>, 1, 32, {}},
      {"mma_float16", multiply<__half>, 1, 32, {}},
      {"mma_bfloat16", multiply<__nv_bfloat16>, 1, 32, {}},
      {"mma_sp_float16_0", multiply_sparse<__half, 0>, 1, 32, {}},
      {"mma_sp_float16_1", multiply_sparse<__half, 1>, 1, 32, {}},
      {"mma_sp_bfloat16_0", multiply_sparse<__nv_bfloat16, 0>, 1, 32, {}},
      {"mma_sp_bfloat16_1", multiply_sparse<__nv_bfloat16, 1>, 1, 32, {}},
  };
  return run_probe(kKernels, name, *probe, reverse);
}
#else
void compile_for_gpu(const Probe& p) {
  launch("probe", load_matrices<2, false>, 1, 32, nullptr, p);
  launch("probe", load_matrices<2, true>, 1, 32, nullptr, p);
  launch("probe", load_matrices<4, false>, 1, 32, nullptr, p);
  launch("probe", load_matrices<4, true>, 1, 32, nullptr, p);
  launch("probe", multiply<__half>, 1, 32, nullptr, p);
  launch("probe", multiply<__nv_bfloat16>, 1, 32, nullptr, p);
  launch("probe", multiply_sparse<__half, 0>, 1, 32, nullptr, p);
  launch("probe", multiply_sparse<__half, 1>, 1, 32, nullptr, p);
  launch("probe", multiply_sparse<__nv_bfloat16, 0>, 1, 32, nullptr, p);
  launch("probe", multiply_sparse<__nv_bfloat16, 1>, 1, 32, nullptr, p);
}
#endif
