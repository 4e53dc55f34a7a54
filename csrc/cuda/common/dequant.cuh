// Reading a 4-bit weight in the CUDA layout (picture in llmkern/formats/int4_cuda.py): where the
// parts of a chunk lie, and codes to 16-bit floats without a rounding.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/common/chunks.cuh"
#include "cuda/common/dtype.cuh"
#include "llmkern.h"

namespace llmkern::cuda {

struct Int4Chunks {
  int64_t per_row;  // chunks that follow each other along K
  int bytes;        // of one chunk
  int group_size;   // columns per scale: 32, 64 or 128
  int zeros_at;     // byte offset of the zero points
};

inline __host__ __device__ Int4Chunks int4_chunks(const Int4Weight& w) {
  const int group_size = inline_group_size(w.group_size);
  const int grids = kChunkRows * (kChunkColumns / group_size);
  const int zeros_at = kCodeBytes + grids * (w.scales_dtype == DType::kFloat32 ? 4 : 2);
  return {(w.K + kChunkColumns - 1) / kChunkColumns, zeros_at + (w.zeros ? grids : 0), group_size,
          zeros_at};
}

// A 16-bit float of 128 (bfloat16) or 1024 (float16) has its last bit worth 1: a code put into the
// low bits is added exactly, and what is subtracted again leaves code - zero exactly.
template <typename T>
struct Biased;
template <>
struct Biased<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  static constexpr uint32_t kBits = 0x43004300;
};
template <>
struct Biased<__half> {
  using Pair = __half2;
  static constexpr uint32_t kBits = 0x64006400;
};

// Both halves the bias plus the zero point of a row.
template <typename T>
__device__ __forceinline__ uint32_t biased_zero(uint32_t zero) {
  return Biased<T>::kBits | zero | zero << 16;
}

// The four registers of an mma operand from a lane's word: code - zero, of the rows g and g + 8.
template <typename T>
__device__ __forceinline__ void unpack_fragment(uint32_t word, const uint32_t (&zero)[2],
                                                uint32_t (&a)[4]) {
  using Pair = typename Biased<T>::Pair;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t biased = (word >> (4 * i) & 0x000f000f) | Biased<T>::kBits;
    Pair value, bias;
    memcpy(&value, &biased, sizeof(value));
    memcpy(&bias, &zero[i % 2], sizeof(bias));
    value = __hsub2(value, bias);
    memcpy(&a[i], &value, sizeof(value));
  }
}

// Two floats, each rounded to T, in the halves of a register.
template <typename T>
__device__ __forceinline__ uint32_t round_pair(float low, float high) {
  typename Biased<T>::Pair pair;
  if constexpr (std::is_same_v<T, __half>)
    pair = __floats2half2_rn(low, high);
  else
    pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

}  // namespace llmkern::cuda
