// How kernels are launched and how they declare shared memory. Both go through here because
// csrc/emu runs the same sources on the host: no <<<>>>, no bare __shared__.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#ifndef LLMKERN_SHARED
// LLMKERN_SHARED(float, tile, [32][64]); the emulator puts guards around each such array.
#define LLMKERN_SHARED(type, name, extents) __shared__ type name extents
// The launch's dynamic shared memory as type* name, 16-byte aligned.
#define LLMKERN_DYNAMIC_SHARED(type, name)                      \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* name = reinterpret_cast<type*>(name##_bytes)
#endif

namespace llmkern::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

struct LaunchOptions {
  size_t dynamic_shared_bytes = 0;  // above 48 KB too, as far as the GPU has it
  int cluster_size = 1;             // CTAs, a divisor of the grid; more than 1 needs sm_90
  // The kernel may begin before the previous one of the stream has ended, and calls
  // ptx::grid_dependency_wait() before it touches what that one reads or writes. Needs sm_90.
  bool programmatic = false;
};

// Runs kernel(args...) on `ctas` CTAs of `threads` threads. One-dimensional: x is the only grid
// axis without a limit of 65535.
template <typename... Params, typename... Args>
void launch_with(const LaunchOptions& options, const char* name, void (*kernel)(Params...),
                 int64_t ctas, int threads, void* stream, const Args&... args) {
  if (ctas == 0) return;
  if (ctas > INT32_MAX)
    throw std::runtime_error(std::string(name) + ": too many CTAs for one launch");
  if (options.dynamic_shared_bytes > 48 << 10)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(options.dynamic_shared_bytes)),
          name);
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(ctas));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = options.dynamic_shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (options.cluster_size > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(options.cluster_size);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  }
  if (options.programmatic) {
    cudaLaunchAttribute& programmatic = attributes[config.numAttrs++];
    programmatic.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    programmatic.val.programmaticStreamSerializationAllowed = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, args...), name);
  check(cudaGetLastError(), name);
}

template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), int64_t ctas, int threads, void* stream,
            const Args&... args) {
  launch_with({}, name, kernel, ctas, threads, stream, args...);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace llmkern::cuda
