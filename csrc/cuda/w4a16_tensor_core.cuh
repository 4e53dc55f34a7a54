// The tensor core tiers of w4a16_gemm, over weights in the CUDA layout
// (llmkern/formats/int4_cuda.py): mma.sync m16n8k16 in the ring of common/chunk_gemm.cuh, on the
// exact integers code - zero.
//
// Not yet run on a GPU: tested in the emulator (csrc/emu) and compiled ahead of time only; tiles,
// ring depths and tiers are not tuned.
#pragma once

#include "cuda/common/code_chunks.cuh"

namespace llmkern::cuda {

struct Int4Decoder {
  static constexpr const char* kOp = "w4a16_gemm";
  static constexpr int kMaxBytes = kCodeBytes + kChunkRows * kChunkColumns / 32 * (4 + 1);

  int bytes;
  int group_size;
  int zeros_at;  // 0: there are none
  DType scales_dtype;
  static constexpr bool scaled = true;

  explicit Int4Decoder(const Int4Weight& w) {
    const Int4Chunks shape = int4_chunks(w);
    bytes = shape.bytes;
    group_size = shape.group_size;
    zeros_at = w.zeros ? shape.zeros_at : 0;
    scales_dtype = w.scales_dtype;
  }

  template <typename T>
  struct Rows {
    uint32_t zero[2] = {biased_zero<T>(8), biased_zero<T>(8)};
  };

  template <typename T>
  __device__ __forceinline__ void enter(Rows<T>& rows, const unsigned char* chunk, int group,
                                        int strip) const {
    if (!zeros_at) return;
    const int at = group * kChunkRows + strip % 4 * 16 + threadIdx.x % 32 / 4 * 2;
    rows.zero[0] = biased_zero<T>(chunk[zeros_at + at]);
    rows.zero[1] = biased_zero<T>(chunk[zeros_at + at + 1]);
  }

  template <typename T>
  __device__ __forceinline__ void decode(uint32_t word, const Rows<T>& rows,
                                         uint32_t (&a)[4]) const {
    unpack_fragment<T>(word, rows.zero, a);
  }
};

template <typename T>
void w4a16_tensor_core(const W4A16GemmParams& p, const ChunkConfig& config, void* stream) {
  const ChunkGemmParams common = {p.x, p.w.qweight, p.bias, p.out, p.M, p.w.N, p.w.K, p.x_stride};
  chunk_gemm<T>(common, CodeChunks<Int4Decoder>(p.w), config, stream);
}

}  // namespace llmkern::cuda
