// Host versions of csrc/cuda/common/ptx.cuh, with the same names and arguments.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "emu/emulator.h"

namespace llmkern::emu {

// Each of the matrix instructions is one warp operation: every lane of a warp must come to it.
void ldmatrix(uint32_t* r, int matrices, bool transposed, const void* row, Site site);

struct MmaOperands {
  float* d;
  const uint32_t *a, *b;
  uint32_t metadata;
  int selector;
  bool bfloat16;
};
void mma(MmaOperands operands, Site site);         // m16n8k16
void mma_sparse(MmaOperands operands, Site site);  // m16n8k32, a 2:4 sparse

void cp_async(void* smem, const void* gmem, bool valid, Site site);
void cp_async_commit();
void cp_async_wait(size_t groups_left, Site site);

void mbarrier_init(const void* mbarrier, uint32_t count, Site site);
void mbarrier_init_fence();
void mbarrier_arrive(const void* mbarrier, uint32_t expected_bytes, Site site);
void mbarrier_wait(const void* mbarrier, uint32_t parity, Site site);
void bulk_copy(void* smem, const void* gmem, uint32_t bytes, const void* mbarrier, Site site);

uint32_t cluster_rank();
uint32_t cluster_size();
const void* cluster_address(const void* smem, size_t bytes, uint32_t rank, Site site);

}  // namespace llmkern::emu

#define LLMKERN_EMU_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace llmkern::cuda::ptx {

inline void ldmatrix_x2(uint32_t (&r)[2], const void* smem_row, LLMKERN_EMU_HERE) {
  emu::ldmatrix(r, 2, false, smem_row, {file, line});
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* smem_row, LLMKERN_EMU_HERE) {
  emu::ldmatrix(r, 4, false, smem_row, {file, line});
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* smem_row, LLMKERN_EMU_HERE) {
  emu::ldmatrix(r, 2, true, smem_row, {file, line});
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem_row, LLMKERN_EMU_HERE) {
  emu::ldmatrix(r, 4, true, smem_row, {file, line});
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], LLMKERN_EMU_HERE) {
  emu::mma({d, a, b, 0, 0, std::is_same_v<T, __nv_bfloat16>}, {file, line});
}

template <typename T, int SELECTOR>
void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                     uint32_t metadata, LLMKERN_EMU_HERE) {
  static_assert(SELECTOR == 0 || SELECTOR == 1);
  emu::mma_sparse({d, a, b, metadata, SELECTOR, std::is_same_v<T, __nv_bfloat16>}, {file, line});
}

inline void cp_async_16(void* smem, const void* gmem, bool valid = true, LLMKERN_EMU_HERE) {
  emu::cp_async(smem, gmem, valid, {file, line});
}
inline void cp_async_commit() { emu::cp_async_commit(); }
template <int GROUPS_LEFT>
void cp_async_wait(LLMKERN_EMU_HERE) {
  emu::cp_async_wait(GROUPS_LEFT, {file, line});
}

inline void mbarrier_init(uint64_t* bar, uint32_t count, LLMKERN_EMU_HERE) {
  emu::mbarrier_init(bar, count, {file, line});
}
inline void mbarrier_init_fence() { emu::mbarrier_init_fence(); }
inline void mbarrier_arrive(uint64_t* bar, LLMKERN_EMU_HERE) {
  emu::mbarrier_arrive(bar, 0, {file, line});
}
inline void mbarrier_arrive_expect_tx(uint64_t* bar, uint32_t bytes, LLMKERN_EMU_HERE) {
  emu::mbarrier_arrive(bar, bytes, {file, line});
}
inline void mbarrier_wait(uint64_t* bar, uint32_t parity, LLMKERN_EMU_HERE) {
  emu::mbarrier_wait(bar, parity, {file, line});
}
inline void bulk_copy(void* smem, const void* gmem, uint32_t bytes, uint64_t* bar,
                      LLMKERN_EMU_HERE) {
  emu::bulk_copy(smem, gmem, bytes, bar, {file, line});
}

inline uint32_t cluster_rank() { return emu::cluster_rank(); }
inline uint32_t cluster_size() { return emu::cluster_size(); }
inline void cluster_sync(LLMKERN_EMU_HERE) { emu::cluster_barrier({file, line}); }
inline float cluster_load(const float* smem, uint32_t rank, LLMKERN_EMU_HERE) {
  return *static_cast<const float*>(emu::cluster_address(smem, sizeof(float), rank, {file, line}));
}

// Grids run one after another.
inline void grid_dependency_wait() {}
inline void grid_launch_dependents() {}

}  // namespace llmkern::cuda::ptx

#undef LLMKERN_EMU_HERE
