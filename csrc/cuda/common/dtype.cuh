// Element types of activations and scales: conversion to and from float, choice at run time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "llmkern.h"

namespace llmkern::cuda {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

__device__ __forceinline__ void store(float* out, float v) { *out = v; }
__device__ __forceinline__ void store(__nv_bfloat16* out, float v) {
  *out = __float2bfloat16_rn(v);
}
__device__ __forceinline__ void store(__half* out, float v) { *out = __float2half_rn(v); }

// Element i of an array whose type is known at run time only: for one load per scale group, where a
// template parameter would triple the kernels and save nothing.
__device__ __forceinline__ float load_as(const void* array, int64_t i, DType dtype) {
  if (dtype == DType::kBFloat16)
    return __bfloat162float(static_cast<const __nv_bfloat16*>(array)[i]);
  if (dtype == DType::kFloat16) return __half2float(static_cast<const __half*>(array)[i]);
  return static_cast<const float*>(array)[i];
}

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

// Can rows `stride` elements apart be read in 16-byte pieces at multiples of 8 elements?
template <typename T>
__host__ __device__ __forceinline__ bool vectorizable(const T* base, int64_t stride) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 &&
         stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}

// Eight consecutive elements as floats; `vector` promises 16-byte alignment.
template <typename T>
__device__ __forceinline__ void load8(const T* p, bool vector, float (&out)[8]) {
  constexpr int kPerPiece = 16 / sizeof(T);
  if (vector) {
#pragma unroll
    for (int piece = 0; piece < 8 / kPerPiece; piece++) {
      const Bytes16 raw = *reinterpret_cast<const Bytes16*>(p + piece * kPerPiece);
      const T* element = reinterpret_cast<const T*>(&raw);
#pragma unroll
      for (int i = 0; i < kPerPiece; i++) out[piece * kPerPiece + i] = to_float(element[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] = to_float(p[i]);
  }
}

// The first `valid` (any number) of eight consecutive elements, zeros after them.
template <typename T>
__device__ __forceinline__ void load8_masked(const T* p, int64_t valid, bool vector,
                                             float (&out)[8]) {
  if (valid >= 8) {
    load8(p, vector, out);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] = i < valid ? to_float(p[i]) : 0.0f;
  }
}

template <typename T>
struct Type {
  using type = T;
};

// f(Type<T>) for the C++ type of `dtype`.
template <typename F>
void dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(Type<float>());
    case DType::kBFloat16:
      return f(Type<__nv_bfloat16>());
    case DType::kFloat16:
      return f(Type<__half>());
  }
}

}  // namespace llmkern::cuda
