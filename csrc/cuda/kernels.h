// Launch functions of the CUDA kernels. `stream` is a cudaStream_t of the current device; nothing
// is synchronized or allocated. A failed launch throws std::runtime_error.
#pragma once

#include "llmkern.h"

namespace llmkern::cuda {

// How a weight in one of the CUDA layouts is multiplied; chosen by llmkern/ops/_w4a16_config.py and
// _sparse24_config.py.
struct ChunkConfig {
  int rows;          // of x per CTA: 8, 16, 32, 64 or 128
  int split;         // slices of K
  bool bulk;         // bulk copies, clusters and programmatic launch: sm_90 and newer
  float* workspace;  // [split, M, N]; null if split is 1 or bulk
  int stages = 0;    // chunks in the ring of a CTA, up to 16; 0: as many as fit everywhere. Without
                     // bulk as many as tiles of x: 4, or 3 for 128 rows
};
LLMKERN_FIELDS(ChunkConfig, rows, split, bulk, workspace, stages)

void w4a16_gemm(const W4A16GemmParams& p, const ChunkConfig& config, void* stream);
void dequantize_int4(const DequantizeInt4Params& p, void* stream);
void lut4_gemm(const Lut4GemmParams& p, const ChunkConfig& config, void* stream);
void dequantize_lut4(const DequantizeLut4Params& p, void* stream);

// A weight in the canonical layout and in the CUDA one, of which one is read and one written.
struct PackChunksParams {
  uint32_t* qweight;      // [N, K/8]
  void* scales;           // [N, K/group_size], elements of scale_bytes (2 or 4); null: none
  uint32_t* zeros;        // [ceil(N/8), K/group_size] of packed zero points; null: none
  float* books;           // [N, K/group_size, 16]; null: none
  unsigned char* chunks;  // [ceil(N / 64), ceil(K / 128), bytes]
  int64_t N, K, group_size;
  int scale_bytes;
  bool split_pairs;  // codes in the order of int4_cuda.py, else of lut4_cuda.py
};
LLMKERN_FIELDS(PackChunksParams, qweight, scales, zeros, books, chunks, N, K, group_size,
               scale_bytes, split_pairs)

void pack_chunks(const PackChunksParams& p, void* stream);
void unpack_chunks(const PackChunksParams& p, void* stream);
// Weights in the CUDA layout, x in 16 bits (dtype).
void sparse24_gemm(const Sparse24GemmParams& p, const ChunkConfig& config, void* stream);
void sparse24_w4a16_gemm(const Sparse24W4A16GemmParams& p, const ChunkConfig& config, void* stream);
void hessian_update(const HessianUpdateParams& p, void* stream);
// Every policy: obs_quantize.cu, which leaves some to obs_prune.cu.
void obs_block(const ObsBlockParams& p, void* stream);
void obs_select(const ObsSelectParams& p, void* stream);
// The counts_stride that it needs.
int64_t obs_select_counts(int64_t N, int64_t columns);

}  // namespace llmkern::cuda
