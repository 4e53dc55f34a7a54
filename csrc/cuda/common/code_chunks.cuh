// Multiplying chunks of 4-bit codes (llmkern/formats/int4_cuda.py, lut4_cuda.py), a format of
// chunk_gemm.cuh that differs from another only in how a word of eight codes becomes the four
// registers of an mma operand.
//
// Per scale group the products of x and the unscaled values are summed by the tensor core, then
// scaled in float32: no weight is rounded by its scale.
//
// A Decoder is a plain struct with
//
//   static constexpr const char* kOp;
//   static constexpr int kMaxBytes;
//   int bytes, group_size;    of a chunk; columns per scale in it, 32, 64 or 128
//   bool scaled;              whether there are scales, behind the codes
//   DType scales_dtype;
//   template <typename T> struct Rows;    what decoding takes for a lane's rows g and g + 8
//   template <typename T>                 at the first step of a group, for a strip of the CTA
//   void enter(Rows<T>& rows, const unsigned char* chunk, int group, int strip) const;
//   template <typename T>                 a word's values, in the order of operand A
//   void decode(uint32_t word, const Rows<T>& rows, uint32_t (&a)[4]) const;
#pragma once

#include "cuda/common/chunk_gemm.cuh"
#include "cuda/common/dequant.cuh"

namespace llmkern::cuda {

template <typename Decoder>
struct CodeChunks : Decoder {
  static constexpr bool kWide = true;

  using Decoder::Decoder;

  template <typename T, int NT>
  __device__ __forceinline__ void multiply(const unsigned char* chunk, const T* x,
                                           float (&acc)[NT][4]) const {
    float (&one)[1][NT][4] = reinterpret_cast<float (&)[1][NT][4]>(acc);
    multiply<T, NT, 1>(chunk, threadIdx.x / 32, x, one);
  }

  template <typename T, int NT, int STRIPS>
  __device__ __forceinline__ void multiply(const unsigned char* chunk, int strip, const T* x,
                                           float (&acc)[STRIPS][NT][4]) const {
    const int lane = threadIdx.x % 32;
    const int steps = this->group_size / 16;  // per group: 2, 4 or 8
    // ldmatrix: lanes 8 i .. 8 i + 7 point at the rows of matrix i: columns 0-7 and 8-15 of rows of
    // x 0-7, then of rows 8-15.
    const T* x_row = x + (lane % 8 + lane / 16 * 8) * kRowStride + lane / 8 % 2 * 8;
    float sum[STRIPS][NT][4] = {};
    typename Decoder::template Rows<T> rows[STRIPS];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      Bytes16 words[STRIPS];
#pragma unroll
      for (int s = 0; s < STRIPS; s++)
        words[s] =
            reinterpret_cast<const Bytes16*>(chunk)[(half * 4 + (strip + s) % 4) * 32 + lane];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int step = 4 * half + j;
        uint32_t a[STRIPS][4];
#pragma unroll
        for (int s = 0; s < STRIPS; s++) {
          if (step % steps == 0) this->template enter<T>(rows[s], chunk, step / steps, strip + s);
          this->template decode<T>(words[s].word[j], rows[s], a[s]);
        }
        if constexpr (NT == 1) {
          uint32_t b[2];
          ptx::ldmatrix_x2(b, x_row - lane / 16 * 8 * kRowStride + step * 16);
#pragma unroll
          for (int s = 0; s < STRIPS; s++) ptx::mma_m16n8k16<T>(sum[s][0], a[s], b);
        } else {
#pragma unroll
          for (int nt = 0; nt < NT; nt += 2) {
            uint32_t b[4];
            ptx::ldmatrix_x4(b, x_row + nt * 8 * kRowStride + step * 16);
            const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
            for (int s = 0; s < STRIPS; s++) {
              ptx::mma_m16n8k16<T>(sum[s][nt], a[s], first);
              ptx::mma_m16n8k16<T>(sum[s][nt + 1], a[s], second);
            }
          }
        }
        if ((step + 1) % steps != 0) continue;
#pragma unroll
        for (int s = 0; s < STRIPS; s++) {
          float low = 1.0f, high = 1.0f;
          if (this->scaled) {
            const int at = step / steps * kChunkRows + (strip + s) % 4 * 16 + lane / 4 * 2;
            low = load_as(chunk + kCodeBytes, at, this->scales_dtype);
            high = load_as(chunk + kCodeBytes, at + 1, this->scales_dtype);
          }
          add_scaled(low, high, sum[s], acc[s]);
        }
      }
    }
  }
};

}  // namespace llmkern::cuda
