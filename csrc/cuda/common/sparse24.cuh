// Reading 2:4 sparse weights in the CUDA layout (picture in llmkern/formats/sparse24_cuda.py): the
// formats of chunk_gemm.cuh and sparse24_tile.cuh, for 16-bit values and for 4-bit codes.
//
// For sparse24_tile.cuh a format also has
//
//   static constexpr int kMaxHalfBytes;
//   int half_bytes;                       of what one half of a chunk takes, a multiple of 16
//   int source(int half, int at) const;   where byte `at` of that lies in the chunk
//   template <typename T>                 the weights of a strip and step, 16 x 32, as operand A
//   void load(const unsigned char* half, int strip, int step, uint32_t (&a)[4]) const;
//   int metadata_at() const;              where the metadata lie in a half
#pragma once

#include "cuda/common/chunk_gemm.cuh"
#include "cuda/common/chunks.cuh"
#include "cuda/common/dequant.cuh"
#include "cuda/common/ptx.cuh"

namespace llmkern::cuda {

constexpr int kMetadataBytes = 512;  // of half a chunk, 64 columns
constexpr int kSparseValueBytes = 4096;
constexpr int kSparseCodeBytes = 1024;

// The word that serves both steps of a half, for the calling lane.
__device__ __forceinline__ uint32_t load_metadata(const unsigned char* metadata, int strip) {
  return reinterpret_cast<const uint32_t*>(metadata)[strip * 32 + threadIdx.x % 32];
}

// The product of a step, which is also the selector of the lanes that hold its metadata.
template <typename T>
__device__ __forceinline__ void mma_step(int step, float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[4], uint32_t metadata) {
  if (step == 0)
    ptx::mma_sp_m16n8k32<T, 0>(d, a, b, metadata);
  else
    ptx::mma_sp_m16n8k32<T, 1>(d, a, b, metadata);
}

// Where a lane points ldmatrix_x4 to get operand B: columns 8 i .. 8 i + 7 of eight rows of x.
template <typename T>
__device__ __forceinline__ const T* lane_of_x(const T* x, int row_stride) {
  const int lane = threadIdx.x % 32;
  return x + lane % 8 * row_stride + lane / 8 * 8;
}

struct Sparse24Format {
  static constexpr const char* kOp = "sparse24_gemm";
  static constexpr int kMaxHalfBytes = kSparseValueBytes + kMetadataBytes;
  static constexpr int kMaxBytes = 2 * kMaxHalfBytes;

  int bytes = kMaxBytes;
  int half_bytes = kMaxHalfBytes;

  __device__ __forceinline__ int source(int half, int at) const { return half * half_bytes + at; }
  __device__ __forceinline__ int metadata_at() const { return kSparseValueBytes; }

  template <typename T>
  __device__ __forceinline__ void load(const unsigned char* half, int strip, int step,
                                       uint32_t (&a)[4]) const {
    const int at = (step * 4 + strip) * 32 + threadIdx.x % 32;
    const Bytes16 pairs = reinterpret_cast<const Bytes16*>(half)[at];
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = pairs.word[i];
  }

  template <typename T, int NT>
  __device__ __forceinline__ void multiply(const unsigned char* chunk, const T* x,
                                           float (&acc)[NT][4]) const {
    const int strip = threadIdx.x / 32;
    const T* x_row = lane_of_x(x, kRowStride);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const unsigned char* values = chunk + half * kMaxHalfBytes;
      const uint32_t metadata = load_metadata(values + kSparseValueBytes, strip);
#pragma unroll
      for (int step = 0; step < 2; step++) {
        uint32_t a[4];
        load<T>(values, strip, step, a);
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
          uint32_t b[4];
          ptx::ldmatrix_x4(b, x_row + nt * 8 * kRowStride + half * 64 + step * 32);
          mma_step<T>(step, acc[nt], a, b, metadata);
        }
      }
    }
  }
};

template <typename T>
__device__ __forceinline__ float2 widen_pair(uint32_t bits) {
  typename Biased<T>::Pair pair;
  memcpy(&pair, &bits, sizeof(pair));
  if constexpr (std::is_same_v<T, __half>)
    return __half22float2(pair);
  else
    return __bfloat1622float2(pair);
}

struct Sparse24Int4Format {
  static constexpr const char* kOp = "sparse24_w4a16_gemm";
  static constexpr int kCodeHalf = kSparseCodeBytes + kMetadataBytes;  // bytes
  static constexpr int kMaxHalfBytes = kCodeHalf + 2 * kChunkRows * (4 + 1);
  static constexpr int kMaxBytes = 2 * kMaxHalfBytes;

  int bytes, half_bytes;
  int group_size;         // 32, 64 or 128
  int half_scales_bytes;  // of the groups that a half takes part in
  int zeros_at;           // in the chunk; 0: there are none
  DType scales_dtype;

  explicit Sparse24Int4Format(const Sparse24W4A16GemmParams& p)
      : group_size(inline_group_size(p.group_size)), scales_dtype(p.scales_dtype) {
    const int scale_bytes = scales_dtype == DType::kFloat32 ? 4 : 2;
    const int groups = kChunkColumns / group_size, in_half = groups > 1 ? groups / 2 : 1;
    half_scales_bytes = kChunkRows * in_half * scale_bytes;
    zeros_at = p.zeros ? 2 * kCodeHalf + kChunkRows * groups * scale_bytes : 0;
    bytes = 2 * kCodeHalf + kChunkRows * groups * (scale_bytes + (p.zeros ? 1 : 0));
    half_bytes = kCodeHalf + half_scales_bytes + (p.zeros ? kChunkRows * in_half : 0);
  }

  __device__ __forceinline__ int source(int half, int at) const {
    if (at < kCodeHalf) return half * kCodeHalf + at;
    const int second = group_size == 128 ? 0 : half;  // both halves share a group of 128
    at -= kCodeHalf;
    if (at < half_scales_bytes) return 2 * kCodeHalf + second * half_scales_bytes + at;
    at -= half_scales_bytes;
    return zeros_at + second * (half_bytes - kCodeHalf - half_scales_bytes) + at;
  }
  __device__ __forceinline__ int metadata_at() const { return kSparseCodeBytes; }

  // scale * (code - zero), rounded once.
  template <typename T>
  __device__ __forceinline__ void load(const unsigned char* half, int strip, int step,
                                       uint32_t (&a)[4]) const {
    const int lane = threadIdx.x % 32;
    const int at = (group_size == 32 ? step * kChunkRows : 0) + strip * 16 + lane / 4 * 2;
    uint32_t zero[2] = {biased_zero<T>(8), biased_zero<T>(8)};
    if (zeros_at) {
      const unsigned char* zeros = half + kCodeHalf + half_scales_bytes + at;
      zero[0] = biased_zero<T>(zeros[0]);
      zero[1] = biased_zero<T>(zeros[1]);
    }
    unpack_fragment<T>(reinterpret_cast<const uint32_t*>(half)[(strip * 32 + lane) * 2 + step],
                       zero, a);
    const float scale[2] = {load_as(half + kCodeHalf, at, scales_dtype),
                            load_as(half + kCodeHalf, at + 1, scales_dtype)};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 value = widen_pair<T>(a[i]);
      a[i] = round_pair<T>(scale[i % 2] * value.x, scale[i % 2] * value.y);
    }
  }

  // Per group the products of x and the exact integers code - zero are summed by the tensor core,
  // then scaled in float32: no weight is rounded.
  template <typename T, int NT>
  __device__ __forceinline__ void multiply(const unsigned char* chunk, const T* x,
                                           float (&acc)[NT][4]) const {
    const int lane = threadIdx.x % 32, strip = threadIdx.x / 32;
    const int steps = group_size / 32;  // per group: 1, 2 or 4
    const int grid_at = strip * 16 + lane / 4 * 2;
    const T* x_row = lane_of_x(x, kRowStride);
    float sum[NT][4] = {};
    uint32_t zero[2] = {biased_zero<T>(8), biased_zero<T>(8)};
#pragma unroll
    for (int step = 0; step < 4; step++) {
      const unsigned char* half = chunk + step / 2 * kCodeHalf;
      const uint32_t metadata = load_metadata(half + kSparseCodeBytes, strip);
      if (zeros_at && step % steps == 0) {
        const unsigned char* zeros = chunk + zeros_at + step / steps * kChunkRows + grid_at;
        zero[0] = biased_zero<T>(zeros[0]);
        zero[1] = biased_zero<T>(zeros[1]);
      }
      const int at = (strip * 32 + lane) * 2 + step % 2;
      uint32_t a[4];
      unpack_fragment<T>(reinterpret_cast<const uint32_t*>(half)[at], zero, a);
#pragma unroll
      for (int nt = 0; nt < NT; nt++) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, x_row + nt * 8 * kRowStride + step * 32);
        mma_step<T>(step % 2, sum[nt], a, b, metadata);
      }
      if ((step + 1) % steps != 0) continue;
      const unsigned char* scales = chunk + 2 * kCodeHalf;
      const int scale_at = step / steps * kChunkRows + grid_at;
      add_scaled(load_as(scales, scale_at, scales_dtype),
                 load_as(scales, scale_at + 1, scales_dtype), sum, acc);
    }
  }
};

}  // namespace llmkern::cuda
