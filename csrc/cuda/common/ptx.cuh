// The only inline PTX of the kernels: matrix instructions, asynchronous copies, clusters. In the
// emulator the same names are host functions (csrc/emu/ptx.h).
//
// Below sm_90 a cluster is one CTA, dependencies between grids are none, and mbarriers and bulk
// copies trap: a kernel that uses those is launched on sm_90 and newer only. Source of every
// instruction's meaning: the PTX ISA.
#pragma once

#ifdef LLMKERN_EMU
#include "emu/ptx.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define LLMKERN_SM90 1
#else
#define LLMKERN_SM90 0
#endif

namespace llmkern::cuda::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* smem) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(smem));
}

// 8 x 8 matrices of 16-bit elements from shared memory: lane 8 i + j gives the address of row j of
// matrix i (16 bytes, aligned to that), and lane l gets elements 2 (l % 4) and 2 (l % 4) + 1 of row
// l / 4 of each; transposed, of column l / 4. x2 reads the addresses of lanes 0 to 15 only.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(smem_row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(smem_row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(smem_row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(smem_row))
               : "memory");
}

// d += a b for a 16 x 16 row by row, b 16 x 8 column by column. With g = lane / 4, t = lane % 4:
//   a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8) and the column after each
//   b: (2t, g), (2t + 8, g) and the row after each;  d: (g, 2t), (g, 2t + 1), both + 8 rows
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  if constexpr (std::is_same_v<T, __half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += a b for a 16 x 32 of which two of every four columns are kept (registers as above, the kept
// ones counted), b 32 x 8: (2t, g), (2t + 8, g), (2t + 16, g), (2t + 24, g) and the row after each.
//
// Metadata: a nibble per four columns, bits 1:0 the index of the first kept one, bits 3:2 of the
// second, first < second. Of the four lanes 4g..4g+3, lane 2 SELECTOR holds columns 0 to 15 and
// lane 2 SELECTOR + 1 columns 16 to 31; bits 15:0 are row g, bits 31:16 row g + 8.
template <typename T, int SELECTOR>
__device__ __forceinline__ void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[4], uint32_t metadata) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  static_assert(SELECTOR == 0 || SELECTOR == 1);
  if constexpr (std::is_same_v<T, __half>)
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
          "r"(metadata), "n"(SELECTOR));
  else
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
          "r"(metadata), "n"(SELECTOR));
}

// 16 bytes (aligned to that) from global to shared memory behind the thread's back, past L1; zeros,
// and gmem is not touched, unless `valid`. The thread sees them after its own cp_async_wait, others
// after a barrier on top of it.
__device__ __forceinline__ void cp_async_16(void* smem, const void* gmem, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(smem)),
               "l"(gmem), "r"(valid ? 16 : 0)
               : "memory");
}

// Ends the thread's current group of copies (an empty one counts too).
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most GROUPS_LEFT of the thread's latest groups are under way.
template <int GROUPS_LEFT>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS_LEFT) : "memory");
}

// An mbarrier counts the arrivals and the bytes of a phase; the first phase has parity 0. One
// thread initialises it, then calls mbarrier_init_fence(), then the CTA synchronizes.
__device__ __forceinline__ void mbarrier_init(uint64_t* bar, uint32_t count) {
#if LLMKERN_SM90
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count)
               : "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void mbarrier_init_fence() {
#if LLMKERN_SM90
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* bar) {
#if LLMKERN_SM90
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
#else
  __trap();
#endif
}

// Arrives, and has the phase wait for `bytes` more bytes of copies.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* bar, uint32_t bytes) {
#if LLMKERN_SM90
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)),
               "r"(bytes)
               : "memory");
#else
  __trap();
#endif
}

// Returns once the phase of this parity has completed: at once if the current one has the other.
__device__ __forceinline__ void mbarrier_wait(uint64_t* bar, uint32_t parity) {
#if LLMKERN_SM90
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(bar)), "r"(parity)
        : "memory");
#else
  __trap();
#endif
}

// `bytes` (a multiple of 16; both addresses aligned to 16) from global to shared memory, counted by
// `bar`. For data read once: leaves L2 first. One thread issues it.
__device__ __forceinline__ void bulk_copy(void* smem, const void* gmem, uint32_t bytes,
                                          uint64_t* bar) {
#if LLMKERN_SM90
  // What createpolicy.fractional.L2::evict_first makes for fraction 1, as CUTLASS encodes it.
  constexpr uint64_t kEvictFirst = 0x12f0000000000000;
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(smem)),
      "l"(gmem), "r"(bytes), "r"(shared_address(bar)), "l"(kEvictFirst)
      : "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank = 0;
#if LLMKERN_SM90
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size = 1;
#if LLMKERN_SM90
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}

// Every thread of every CTA of the cluster comes here before any goes on; shared memory written
// before it is seen after it. No CTA may end while another can still read its shared memory.
__device__ __forceinline__ void cluster_sync() {
#if LLMKERN_SM90
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// What CTA `rank` of the cluster holds where this one has `smem`.
__device__ __forceinline__ float cluster_load(const float* smem, uint32_t rank) {
#if LLMKERN_SM90
  uint32_t address;
  float value;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(shared_address(smem)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
#else
  return *smem;
#endif
}

// Waits until the grids that this one depends on have ended and their writes are visible; without
// the launch option `programmatic` they already have.
__device__ __forceinline__ void grid_dependency_wait() {
#if LLMKERN_SM90
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next grid of the stream begin as soon as every CTA of this one has come here or ended.
__device__ __forceinline__ void grid_launch_dependents() {
#if LLMKERN_SM90
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace llmkern::cuda::ptx

#undef LLMKERN_SM90

#endif  // LLMKERN_EMU
