// Stands in for the CUDA runtime's header when csrc/cuda is compiled for the host. Holds what the
// kernels use; a kernel that uses more fails to compile until it is added here.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>

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

// Vector types, aligned as on the device.
#define LLMKERN_EMU_VECTORS(type, name)                            \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };         \
  struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; };   \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
LLMKERN_EMU_VECTORS(float, float)
LLMKERN_EMU_VECTORS(int, int)
LLMKERN_EMU_VECTORS(unsigned, uint)
#undef LLMKERN_EMU_VECTORS

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

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }

// Byte i of the result is byte `selector nibble i` of the eight in (high, low).
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t nibble = selector >> (4 * i) & 15;
    uint32_t byte = bytes >> (8 * (nibble & 7)) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;  // the sign, replicated
    out |= byte << (8 * i);
  }
  return out;
}

inline uint32_t __float_as_uint(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}

// Loads and stores with a caching hint. Blocks run one after another, so fences do nothing.
template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
void __stcg(T* p, T v) {
  *p = v;
}
inline void __threadfence() {}

template <typename T>
T atomicAdd(T* p, T v) {
  const T old = *p;
  *p = old + v;
  return old;
}

// The runtime API: one device, one stream, launches that run at once.
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidDevice = 101 };
struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6
};

union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
  int programmaticStreamSerializationAllowed;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
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

namespace llmkern::emu {

constexpr size_t kDefaultSharedBytes = 48 << 10;
constexpr size_t kMaxSharedBytes = 227 << 10;  // of a block on sm_90; sm_80 has 163 KB
constexpr unsigned kMaxCluster = 8;            // that every sm_90 GPU takes

// Dynamic shared memory that each kernel has been allowed.
inline std::map<void (*)(), size_t> dynamic_shared_limits;

template <typename Kernel>
void (*any_kernel(Kernel* kernel))() {
  return reinterpret_cast<void (*)()>(kernel);
}

// False for what no GPU takes.
inline bool read_config(const cudaLaunchConfig_t& config, void (*kernel)(), Launch* launch) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  *launch = {grid, block, 1, config.dynamicSmemBytes, kDefaultSharedBytes};
  for (unsigned i = 0; i < config.numAttrs; i++) {
    if (config.attrs[i].id != cudaLaunchAttributeClusterDimension) continue;
    const auto& cluster = config.attrs[i].val.clusterDim;
    if (cluster.x < 1 || cluster.x > kMaxCluster || cluster.y != 1 || cluster.z != 1) return false;
    launch->cluster = cluster.x;
  }
  const auto limit = dynamic_shared_limits.find(kernel);
  if (limit != dynamic_shared_limits.end()) {
    if (config.dynamicSmemBytes > std::max(limit->second, kDefaultSharedBytes)) return false;
    launch->max_shared_bytes = kMaxSharedBytes;
  }
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  return threads > 0 && threads <= 1024 && grid.x > 0 && grid.x <= INT32_MAX && grid.y > 0 &&
         grid.y <= 65535 && grid.z > 0 && grid.z <= 65535 && grid.x % launch->cluster == 0 &&
         config.dynamicSmemBytes <= launch->max_shared_bytes;
}

}  // namespace llmkern::emu

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      static_cast<size_t>(value) > llmkern::emu::kMaxSharedBytes)
    return cudaErrorInvalidValue;
  llmkern::emu::dynamic_shared_limits[llmkern::emu::any_kernel(kernel)] = value;
  return cudaSuccess;
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  llmkern::emu::Launch launch;
  if (!read_config(*config, llmkern::emu::any_kernel(kernel), &launch))
    return cudaErrorInvalidValue;
  llmkern::emu::run_grid(launch, [&] { kernel(args...); });
  return cudaSuccess;
}
