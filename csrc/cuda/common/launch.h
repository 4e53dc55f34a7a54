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

// Runs kernel(args...) on `ctas` CTAs of `threads` threads. One-dimensional: x is the only grid
// axis without a limit of 65535.
template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), int64_t ctas, int threads, void* stream,
            const Args&... args) {
  if (ctas == 0) return;
  if (ctas > INT32_MAX)
    throw std::runtime_error(std::string(name) + ": too many CTAs for one launch");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(ctas));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, args...), name);
  check(cudaGetLastError(), name);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace llmkern::cuda
