// Stands in for the CUDA runtime's header when csrc/cuda is compiled for the host. Holds what the
// kernels use; a kernel that uses more fails to compile until it is added here.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "emu/emulator.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define LLMKERN_SHARED(type, name, extents) \
  auto& name = ::llmkern::emu::shared<type extents>({__FILE__, __LINE__})
#define LLMKERN_DYNAMIC_SHARED(type, name) \
  type* name = static_cast<type*>(::llmkern::emu::dynamic_shared())

using dim3 = llmkern::emu::Extent;
inline const llmkern::emu::Index& threadIdx = llmkern::emu::thread_index;
inline const llmkern::emu::Index& blockIdx = llmkern::emu::block_index;
inline const dim3& blockDim = llmkern::emu::block_extent;
inline const dim3& gridDim = llmkern::emu::grid_extent;

using std::max;
using std::min;

// Barriers and warp operations. The source position comes in as a default argument.
#define LLMKERN_EMU_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(LLMKERN_EMU_HERE) { llmkern::emu::block_barrier({file, line}); }

inline void __syncwarp(uint32_t mask = 0xffffffffu, LLMKERN_EMU_HERE) {
  llmkern::emu::warp_operation(mask, {file, line}, [](void* const*, uint32_t) {}, nullptr);
}

namespace llmkern::emu {

template <typename T>
struct Shuffle {
  T value, result;
  int source;  // lane
  bool missing;
};

template <typename T>
T shuffle(uint32_t mask, T value, int source, Site site) {
  Shuffle<T> mine = {value, value, source, false};
  warp_operation(
      mask, site,
      [](void* const* args, uint32_t lanes) {
        for (int lane = 0; lane < 32; lane++) {
          if (!(lanes >> lane & 1)) continue;
          auto* to = static_cast<Shuffle<T>*>(args[lane]);
          to->missing = !(lanes >> to->source & 1);
          if (!to->missing) to->result = static_cast<Shuffle<T>*>(args[to->source])->value;
        }
      },
      &mine);
  if (mine.missing) fail("shuffle from a lane outside its mask", site);
  return mine.result;
}

struct Vote {
  bool predicate;
  uint32_t ballot;
};

inline uint32_t ballot(uint32_t mask, bool predicate, Site site) {
  Vote mine = {predicate, 0};
  warp_operation(
      mask, site,
      [](void* const* args, uint32_t lanes) {
        uint32_t ballot = 0;
        for (int lane = 0; lane < 32; lane++)
          if (lanes >> lane & 1 && static_cast<Vote*>(args[lane])->predicate) ballot |= 1u << lane;
        for (int lane = 0; lane < 32; lane++)
          if (lanes >> lane & 1) static_cast<Vote*>(args[lane])->ballot = ballot;
      },
      &mine);
  return mine.ballot;
}

inline int lane() {
  return (thread_index.x + block_extent.x * (thread_index.y + block_extent.y * thread_index.z)) %
         32;
}

}  // namespace llmkern::emu

// A source lane outside the segment of `width` lanes means the lane's own value, as on the device.
template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, LLMKERN_EMU_HERE) {
  const int segment = llmkern::emu::lane() & ~(width - 1);
  return llmkern::emu::shuffle(mask, value, segment | (source & (width - 1)), {file, line});
}

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32, LLMKERN_EMU_HERE) {
  const int lane = llmkern::emu::lane(), source = lane ^ lane_mask;
  const bool inside = source < (lane & ~(width - 1)) + width;
  return llmkern::emu::shuffle(mask, value, inside ? source : lane, {file, line});
}

template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, LLMKERN_EMU_HERE) {
  const int lane = llmkern::emu::lane(), source = lane + static_cast<int>(delta);
  const bool inside = source < (lane & ~(width - 1)) + width;
  return llmkern::emu::shuffle(mask, value, inside ? source : lane, {file, line});
}

template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, LLMKERN_EMU_HERE) {
  const int lane = llmkern::emu::lane(), source = lane - static_cast<int>(delta);
  const bool inside = source >= (lane & ~(width - 1));
  return llmkern::emu::shuffle(mask, value, inside ? source : lane, {file, line});
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, LLMKERN_EMU_HERE) {
  return llmkern::emu::ballot(mask, predicate != 0, {file, line});
}

inline int __any_sync(uint32_t mask, int predicate, LLMKERN_EMU_HERE) {
  return llmkern::emu::ballot(mask, predicate != 0, {file, line}) != 0;
}

inline int __all_sync(uint32_t mask, int predicate, LLMKERN_EMU_HERE) {
  return llmkern::emu::ballot(mask, predicate != 0, {file, line}) == mask;
}

#undef LLMKERN_EMU_HERE

// Arithmetic with its rounding spelled out. The host build forbids contraction, so plain operators
// round once as well.
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }

template <typename T>
T __ldg(const T* p) {
  return *p;
}

// The runtime API: one device, one stream, launches that run at once.
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidDevice = 101 };
struct CUstream_st;
using cudaStream_t = CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t status) {
  if (status == cudaErrorInvalidValue) return "invalid argument";
  return status == cudaSuccess ? "no error" : "invalid device ordinal";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  const dim3 &grid = config->gridDim, &block = config->blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const bool valid = threads > 0 && threads <= 1024 && grid.x > 0 && grid.x <= INT32_MAX &&
                     grid.y > 0 && grid.y <= 65535 && grid.z > 0 && grid.z <= 65535;
  if (!valid) return cudaErrorInvalidValue;
  llmkern::emu::run_grid(grid, block, config->dynamicSmemBytes, [&] { kernel(args...); });
  return cudaSuccess;
}
