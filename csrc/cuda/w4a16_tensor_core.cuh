// The tensor core tiers of w4a16_gemm, over weights in the CUDA layout
// (llmkern/formats/int4_cuda.py): mma.sync m16n8k16 in the ring of common/chunk_gemm.cuh.
//
// Per scale group the products of x and the exact integers code - zero are summed by the tensor
// core, then scaled in float32: no weight is ever rounded.
//
// Not yet run on a GPU: tested in the emulator (csrc/emu) and compiled ahead of time only; tiles,
// ring depths and tiers are not tuned.
#pragma once

#include "cuda/common/chunk_gemm.cuh"
#include "cuda/common/dequant.cuh"

namespace llmkern::cuda {

struct Int4Format {
  static constexpr const char* kOp = "w4a16_gemm";
  static constexpr int kMaxBytes = kCodeBytes + kChunkRows * kChunkColumns / 32 * (4 + 1);

  int bytes;
  int group_size;  // 32, 64 or 128
  int zeros_at;    // 0: there are none
  DType scales_dtype;

  explicit Int4Format(const Int4Weight& w) {
    const Int4Chunks shape = int4_chunks(w);
    bytes = shape.bytes;
    group_size = shape.group_size;
    zeros_at = w.zeros ? shape.zeros_at : 0;
    scales_dtype = w.scales_dtype;
  }

  template <typename T, int NT>
  __device__ __forceinline__ void multiply(const unsigned char* chunk, const T* x,
                                           float (&acc)[NT][4]) const {
    const int lane = threadIdx.x % 32, strip = threadIdx.x / 32;
    const int steps = group_size / 16;  // per group: 2, 4 or 8
    const int grid_at = strip * 16 + lane / 4 * 2;
    // ldmatrix: lanes 8 i .. 8 i + 7 point at the rows of matrix i: columns 0-7 and 8-15 of rows of
    // x 0-7, then of rows 8-15.
    const T* x_row = x + (lane % 8 + lane / 16 * 8) * kRowStride + lane / 8 % 2 * 8;
    float sum[NT][4] = {};
    uint32_t zero[2] = {biased_zero<T>(8), biased_zero<T>(8)};
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const Bytes16 words = reinterpret_cast<const Bytes16*>(chunk)[(half * 4 + strip) * 32 + lane];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int step = 4 * half + j;
        if (zeros_at && step % steps == 0) {
          const unsigned char* zeros = chunk + zeros_at + step / steps * kChunkRows + grid_at;
          zero[0] = biased_zero<T>(zeros[0]);
          zero[1] = biased_zero<T>(zeros[1]);
        }
        uint32_t a[4];
        unpack_fragment<T>(words.word[j], zero, a);
        if constexpr (NT == 1) {
          uint32_t b[2];
          ptx::ldmatrix_x2(b, x_row - lane / 16 * 8 * kRowStride + step * 16);
          ptx::mma_m16n8k16<T>(sum[0], a, b);
        } else {
#pragma unroll
          for (int nt = 0; nt < NT; nt += 2) {
            uint32_t b[4];
            ptx::ldmatrix_x4(b, x_row + nt * 8 * kRowStride + step * 16);
            const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
            ptx::mma_m16n8k16<T>(sum[nt], a, first);
            ptx::mma_m16n8k16<T>(sum[nt + 1], a, second);
          }
        }
        if ((step + 1) % steps != 0) continue;
        const int at = step / steps * kChunkRows + grid_at;
        const float low = load_as(chunk + kCodeBytes, at, scales_dtype);
        const float high = load_as(chunk + kCodeBytes, at + 1, scales_dtype);
        add_scaled(low, high, sum, acc);
      }
    }
  }
};

template <typename T>
void w4a16_tensor_core(const W4A16GemmParams& p, const ChunkConfig& config, void* stream) {
  const ChunkGemmParams common = {p.x, p.w.qweight, p.bias, p.out, p.M, p.w.N, p.w.K, p.x_stride};
  chunk_gemm<T>(common, Int4Format(p.w), config, stream);
}

}  // namespace llmkern::cuda
