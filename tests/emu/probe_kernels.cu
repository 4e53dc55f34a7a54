// Tiny kernels with known faults, and their correct twins: what test_emulator.py checks the
// emulator with. Each takes a float buffer; run() returns the emulator's error, or "".

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common/dtype.cuh"
#include "cuda/common/launch.h"
#include "emu/emulator.h"
#include "probes.h"

using namespace llmkern::cuda;

namespace {

constexpr int kThreads = 96;

__global__ void neighbour(float* data, bool sync) {
  LLMKERN_SHARED(float, buffer, [kThreads]);
  const int tid = threadIdx.x;
  buffer[tid] = data[tid];
  if (sync) __syncthreads();
  data[tid] = buffer[(tid + 1) % kThreads];
}

// Rotates twice; without the second barrier a fast thread overwrites what a slow one has yet to
// read.
__global__ void rotate_twice(float* data, bool second_sync) {
  LLMKERN_SHARED(float, buffer, [kThreads]);
  const int tid = threadIdx.x;
  float value = data[tid];
  for (int round = 0; round < 2; round++) {
    buffer[tid] = value;
    __syncthreads();
    value = buffer[(tid + 1) % kThreads];
    if (second_sync) __syncthreads();
  }
  data[tid] = value;
}

__global__ void shared_write(float*, int at) {
  LLMKERN_SHARED(float, buffer, [kThreads]);
  float* start = buffer;
  start[at] = 1.0f;
}

__global__ void shared_read(float* data, int at) {
  LLMKERN_SHARED(float, buffer, [kThreads]);
  const float* start = buffer;
  if (threadIdx.x == 0) data[0] = start[at];
}

// As many floats of dynamic shared memory as threads: rotates through it, then writes at `at`.
__global__ void dynamic_shared(float* data, int at) {
  LLMKERN_DYNAMIC_SHARED(float, buffer);
  const int tid = threadIdx.x;
  buffer[tid] = data[tid];
  __syncthreads();
  data[tid] = buffer[(tid + 1) % kThreads];
  __syncthreads();
  buffer[at] = 1.0f;
}

__global__ void array_index(float* data, int at) {
  LLMKERN_SHARED(float, buffer, [kThreads]);
  buffer[at] = data[0];
}

__global__ void barrier_in_a_branch(float*, int) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void barrier_after_an_exit(float*, int) {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

__global__ void shuffle_without_a_lane(float* data, int) {
  if (threadIdx.x % 32 != 3) data[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

__global__ void shuffle_from_outside_the_mask(float* data, int) {
  if (threadIdx.x % 32 < 16) data[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.0f, 20);
}

__global__ void misaligned_vector(float* data, int at) {
  reinterpret_cast<Bytes16*>(data + at)->word[0] = 0;
}

__global__ void global_read(float* data, int at) { data[0] = data[at]; }

// Inclusive sums inside segments of 8 lanes, by shuffles; then, in the upper half of each warp
// under a mask of its own, everyone's ballot of "the value is odd".
__global__ void segmented_sums(float* data, int) {
  const int tid = threadIdx.x, lane = tid % 32;
  float value = data[tid];
  for (int delta = 1; delta < 8; delta *= 2) {
    const float before = __shfl_up_sync(0xffffffffu, value, delta, 8);
    if (lane % 8 >= delta) value += before;
  }
  if (lane >= 16) {
    const uint32_t odd = __ballot_sync(0xffff0000u, static_cast<int>(data[tid]) % 2);
    __syncwarp(0xffff0000u);
    if (lane == 16) value = static_cast<float>(odd >> 16);
  }
  data[tid] = value;
}

// Block (x, y) of a 3 x 2 grid of 4 x 2 threads writes where it is.
__global__ void coordinates(float* data, int) {
  const int block = blockIdx.x + gridDim.x * blockIdx.y;
  const int thread = threadIdx.x + blockDim.x * threadIdx.y;
  data[block * 8 + thread] = static_cast<float>(100 * block + thread);
}

struct FloatProbe {
  const char* name;
  void (*kernel)(float*, int);
};

constexpr FloatProbe kProbes[] = {
    {"shared_write", shared_write},
    {"shared_read", shared_read},
    {"array_index", array_index},
    {"barrier_in_a_branch", barrier_in_a_branch},
    {"barrier_after_an_exit", barrier_after_an_exit},
    {"shuffle_without_a_lane", shuffle_without_a_lane},
    {"shuffle_from_outside_the_mask", shuffle_from_outside_the_mask},
    {"misaligned_vector", misaligned_vector},
    {"global_read", global_read},
    {"segmented_sums", segmented_sums},
};

}  // namespace

EXPORT const char* run(const char* name, float* data, int argument, bool reverse) {
  return error_of([&] {
    llmkern::emu::set_order(reverse ? llmkern::emu::Order::kReverse
                                    : llmkern::emu::Order::kForward);
    const std::string wanted = name;
    if (wanted == "neighbour") return launch(name, neighbour, 1, kThreads, nullptr, data, argument);
    if (wanted == "rotate_twice")
      return launch(name, rotate_twice, 1, kThreads, nullptr, data, argument);
    cudaLaunchConfig_t config = {};
    if (wanted == "dynamic_shared") {
      config.blockDim = dim3(kThreads);
      config.dynamicSmemBytes = kThreads * sizeof(float);
      return check(cudaLaunchKernelEx(&config, dynamic_shared, data, argument), name);
    }
    if (wanted == "coordinates") {
      config.gridDim = dim3(3, 2);
      config.blockDim = dim3(4, 2);
      return check(cudaLaunchKernelEx(&config, coordinates, data, 0), name);
    }
    for (const FloatProbe& probe : kProbes)
      if (wanted == probe.name)
        return launch(name, probe.kernel, 1, kThreads, nullptr, data, argument);
    throw std::runtime_error("no such probe");
  });
}

EXPORT const char* launch_with(int64_t ctas, int threads) {
  return error_of([&] {
    float data;
    launch("probe", global_read, ctas, threads, nullptr, &data, 0);
  });
}

EXPORT void to_float16(const float* in, uint16_t* bf16, uint16_t* fp16, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    bf16[i] = __float2bfloat16_rn(in[i]).bits;
    fp16[i] = __float2half_rn(in[i]).bits;
  }
}

EXPORT void from_float16(const uint16_t* in, float* from_bf16, float* from_fp16, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    from_bf16[i] = __bfloat162float({in[i]});
    from_fp16[i] = __half2float({in[i]});
  }
}

// out[i] = a[i] op b[i] (op c[i]) in 16-bit arithmetic, in both halves of a pair.
template <typename T, typename Pair>
void arithmetic(int op, const uint16_t* a, const uint16_t* b, const uint16_t* c, uint16_t* out,
                int64_t n) {
  for (int64_t i = 0; i + 1 < n; i += 2) {
    const Pair x = {T{a[i]}, T{a[i + 1]}}, y = {T{b[i]}, T{b[i + 1]}}, z = {T{c[i]}, T{c[i + 1]}};
    const Pair r = op == 0   ? __hadd2(x, y)
                   : op == 1 ? __hsub2(x, y)
                   : op == 2 ? __hmul2(x, y)
                             : __hfma2(x, y, z);
    out[i] = r.x.bits;
    out[i + 1] = r.y.bits;
  }
}

EXPORT void arithmetic16(bool bfloat16, int op, const uint16_t* a, const uint16_t* b,
                         const uint16_t* c, uint16_t* out, int64_t n) {
  if (bfloat16)
    arithmetic<__nv_bfloat16, __nv_bfloat162>(op, a, b, c, out, n);
  else
    arithmetic<__half, __half2>(op, a, b, c, out, n);
}
