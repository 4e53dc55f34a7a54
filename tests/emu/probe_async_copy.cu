// Small pipelines of asynchronous copies, and a cluster whose CTAs read from each other; each right
// in mode 0 and broken on purpose in the others. For test_async_copy.py, and for nvcc in
// tests/cuda/test_aot.py.

#include "cuda/common/launch.h"
#include "cuda/common/ptx.cuh"
#include "probes.h"

using namespace llmkern::cuda;

namespace {

constexpr int kThreads = 64;
constexpr int kStages = 3;
constexpr int kSteps = 7;
constexpr int kStageFloats = kThreads * 4;

enum CopyFault {
  kNoFault,
  kNoWait,            // reads at once
  kWaitsForTooFew,    // the group that is read may be under way
  kNoBarrier,         // other threads' copies are read after a wait of one's own
  kOvertakes,         // a stage is filled again before everybody has read it
  kMisalignedSource,  //
  kMisalignedTarget,  //
  kNotShared,         //
  kAcrossTheEnd,      //
  kLeavesUnfinished,  // ends without a wait
  kWritesMeanwhile,   // stores to the target
  kInvalid,           // not a fault: one thread's copies are not valid
};

// out[step][i] = a[step][i], read by another thread than copied it. Thread t copies floats 4t...
__global__ void cp_async_pipeline(const Probe p) {
  LLMKERN_SHARED(float, stages, [kStages][kStageFloats]);
  const int tid = threadIdx.x;
  const auto* a = static_cast<const float*>(p.a);
  auto* out = static_cast<float*>(p.out);
  const auto fetch = [&](int step) {
    if (step < kSteps) {
      float* to = stages[step % kStages] + 4 * tid;
      const float* from = a + step * kStageFloats + 4 * tid;
      if (p.mode == kMisalignedSource) from++;
      if (p.mode == kMisalignedTarget) to += 2;
      if (p.mode == kNotShared) to = out;
      if (p.mode == kAcrossTheEnd) to += kStages * kStageFloats;
      ptx::cp_async_16(to, from, p.mode != kInvalid || tid != 5);
      if (p.mode == kWritesMeanwhile && step == 1 && tid == 9) to[2] = 1.0f;
    }
    ptx::cp_async_commit();
  };
  const int ahead = p.mode == kOvertakes ? kStages : kStages - 1;
  for (int step = 0; step < ahead; step++) fetch(step);
  for (int step = 0; step < kSteps; step++) {
    if (p.mode == kLeavesUnfinished && step == kSteps - 1) return;
    if (p.mode == kWaitsForTooFew || p.mode == kOvertakes)
      ptx::cp_async_wait<kStages - 1>();
    else if (p.mode != kNoWait)
      ptx::cp_async_wait<kStages - 2>();
    if (p.mode != kNoBarrier) __syncthreads();
    if (p.mode != kOvertakes) fetch(step + ahead);
    for (int i = 0; i < 4; i++) {
      const int at = kStageFloats - 1 - (i * kThreads + tid);
      out[step * kStageFloats + at] = stages[step % kStages][at];
      if (p.mode == kOvertakes && i == 0) fetch(step + ahead);  // into this very stage
    }
  }
  ptx::cp_async_wait<0>();
}

enum BulkFault {
  kBulkNoWait = 1,
  kNeverFreed,        // the producer fills a stage again without any wait
  kExpectsTooMuch,    //
  kExpectsTooLittle,  //
  kWrongParity,       // the consumers wait for the phase before
  kNoFence,           //
  kNoInitialisation,  //
  kTwiceInitialised,  //
  kOddSize,           //
  kBulkMisaligned,    //
  kBulkAcrossTheEnd,  //
  kNeverWaited,       // ends while a copy is under way
  kTooManyArrivals,   //
  kBulkWrites,        // a consumer stores to a stage that is being filled
  kArrivesTooFew,     // a consumer forgets to free a stage
  kBulkOvertakes,     // the producer waits for the last copy to a stage, not for its readers
};

constexpr uint32_t kStageBytes = kStageFloats * sizeof(float);

// The same as above, by warps: lane 0 of the last one keeps the stages filled, the others empty
// them.
__global__ void bulk_pipeline(const Probe p) {
  LLMKERN_DYNAMIC_SHARED(float, stages);  // [kStages][kStageFloats]
  LLMKERN_SHARED(uint64_t, full, [kStages]);
  LLMKERN_SHARED(uint64_t, empty, [kStages]);
  const int tid = threadIdx.x;
  const auto* a = static_cast<const float*>(p.a);
  auto* out = static_cast<float*>(p.out);
  if (tid == kThreads) {
    for (int s = 0; s < kStages && p.mode != kNoInitialisation; s++) {
      ptx::mbarrier_init(&full[s], 1);
      ptx::mbarrier_init(&empty[s], kThreads);
      if (p.mode == kTwiceInitialised) ptx::mbarrier_init(&empty[s], kThreads);
    }
    if (p.mode != kNoFence) ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (tid == kThreads) {
    const int steps = p.mode == kNeverWaited ? kSteps + 1 : kSteps;
    for (int step = 0; step < steps; step++) {
      const int s = step % kStages;
      if (p.mode != kNeverFreed)
        ptx::mbarrier_wait(p.mode == kBulkOvertakes ? &full[s] : &empty[s],
                           (step / kStages & 1) ^ 1);
      const uint32_t bytes = p.mode == kExpectsTooMuch     ? kStageBytes + 16
                             : p.mode == kExpectsTooLittle ? kStageBytes - 16
                                                           : kStageBytes;
      ptx::mbarrier_arrive_expect_tx(&full[s], bytes);
      float* to = stages + s * kStageFloats;
      if (p.mode == kBulkMisaligned) to += 1;
      if (p.mode == kBulkAcrossTheEnd) to += kStages * kStageFloats - 4;
      ptx::bulk_copy(to, a + step % kSteps * kStageFloats,
                     p.mode == kOddSize ? kStageBytes - 4 : kStageBytes, &full[s]);
    }
  } else if (tid < kThreads) {
    for (int step = 0; step < kSteps; step++) {
      const int s = step % kStages;
      const uint32_t parity = step / kStages & 1;
      if (p.mode != kBulkNoWait) ptx::mbarrier_wait(&full[s], parity ^ (p.mode == kWrongParity));
      for (int i = 0; i < 4; i++) {
        const int at = kStageFloats - 1 - (i * kThreads + tid);
        out[step * kStageFloats + at] = stages[s * kStageFloats + at];
      }
      if (p.mode == kBulkWrites && step == 0 && tid == 0) stages[2 * kStageFloats] = 1.0f;
      if (p.mode == kArrivesTooFew && step == 1 && tid == 7) continue;
      ptx::mbarrier_arrive(&empty[s]);
      if (p.mode == kTooManyArrivals) ptx::mbarrier_arrive(&full[s]);
    }
  }
}

enum ClusterFault {
  kNoSyncBefore = 1,
  kNoSyncAfter,    // ends while others read
  kBadRank,        //
  kNotSharedRead,  //
  kStaysAway,      // a CTA does not come to the barrier
};

// out[cta][rank][thread]: what each CTA of a cluster holds, and at the end the sizes.
__global__ void exchange(const Probe p) {
  LLMKERN_SHARED(float, mine, [kThreads]);
  const int tid = threadIdx.x;
  auto* out = static_cast<float*>(p.out);
  ptx::grid_launch_dependents();
  ptx::grid_dependency_wait();
  mine[tid] = static_cast<const float*>(p.a)[blockIdx.x * kThreads + tid];
  if (p.mode == kStaysAway && blockIdx.x == 1) return;
  if (p.mode != kNoSyncBefore) ptx::cluster_sync();
  const uint32_t size = ptx::cluster_size();
  for (uint32_t rank = 0; rank < size; rank++) {
    const float* from = mine + (tid + 1) % kThreads;
    if (p.mode == kNotSharedRead) from = out;
    out[(blockIdx.x * size + rank) * kThreads + tid] =
        ptx::cluster_load(from, p.mode == kBadRank ? size : rank);
  }
  if (p.mode != kNoSyncAfter) ptx::cluster_sync();
  if (tid == 0)
    out[gridDim.x * size * kThreads + blockIdx.x] = static_cast<float>(ptx::cluster_rank());
}

}  // namespace

#ifdef LLMKERN_EMU
EXPORT const char* async_copy_probe(const char* name, const Probe* probe, bool reverse) {
  static const ProbeKernel kKernels[] = {
      {"cp_async", cp_async_pipeline, 1, kThreads, {}},
      {"bulk_copy", bulk_pipeline, 2, kThreads + 32, {kStages * kStageBytes, 1, true}},
      {"cluster", exchange, 6, kThreads, {0, 3, true}},
      {"no_cluster", exchange, 6, kThreads, {}},
  };
  return run_probe(kKernels, name, *probe, reverse);
}

namespace {

// ASKED only tells two kernels apart: what one is allowed, the other is not.
template <bool ASKED>
__global__ void last_byte(const Probe p) {
  LLMKERN_SHARED(uint8_t, fixed, [4096]);
  LLMKERN_DYNAMIC_SHARED(uint8_t, bytes);
  fixed[4095] = 1;
  bytes[p.mode - 1] = 1;
}

}  // namespace

// `bytes` of dynamic shared memory and 4 KB of static, with or without asking for more than 48 KB.
EXPORT const char* launch_shared(int bytes, int ctas, int cluster, bool ask) {
  return error_of([&] {
    const Probe probe = {nullptr, nullptr, nullptr, nullptr, bytes};
    if (ask)
      return launch_with({static_cast<size_t>(bytes), cluster, false}, "probe", last_byte<true>,
                         ctas, 1, nullptr, probe);
    cudaLaunchConfig_t config = {};
    config.dynamicSmemBytes = bytes;
    check(cudaLaunchKernelEx(&config, last_byte<false>, probe), "probe");
  });
}
#else
void compile_for_gpu(const Probe& p) {
  launch("probe", cp_async_pipeline, 1, kThreads, nullptr, p);
  launch_with({kStages * kStageBytes, 1, true}, "probe", bulk_pipeline, 2, kThreads + 32, nullptr,
              p);
  launch_with({0, 3, true}, "probe", exchange, 6, kThreads, nullptr, p);
}
#endif
