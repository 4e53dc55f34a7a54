// The tensor core tiers of lut4_gemm, over weights in the CUDA layout
// (llmkern/formats/lut4_cuda.py): mma.sync m16n8k16 in the ring of common/chunk_gemm.cuh, on the
// book's entries rounded to the type of x.
//
// A byte of codes is the pair of one register of operand A. One book for all is a table of 256 such
// pairs, a copy of it per bank of shared memory, so that each lane has a bank for itself. Books of
// rows (in shared memory) or groups (in the chunks) are looked up entry by entry, in float32.
//
// Technique: the table of pairs is FLUTE's (arXiv 2407.10960).
//
// Not yet run on a GPU: tested in the emulator (csrc/emu) and compiled ahead of time only; tiles,
// ring depths and tiers are not tuned.
#pragma once

#include "cuda/common/code_chunks.cuh"
#include "cuda/common/lut4.cuh"

namespace llmkern::cuda {

constexpr int kBanks = 32;

// What the decoders of one book and of many share.
struct Lut4DecoderBase {
  static constexpr const char* kOp = "lut4_gemm";

  int bytes, group_size, books_at;
  DType scales_dtype;
  bool scaled;
  const float* codebook;

  explicit Lut4DecoderBase(const Lut4Weight& w) {
    const Lut4Chunks shape = lut4_chunks(w);
    bytes = shape.bytes;
    group_size = shape.group_size;
    books_at = shape.books_at;
    scales_dtype = w.scales_dtype;
    scaled = w.scales != nullptr;
    codebook = w.codebook;
  }
};

struct OneBookDecoder : Lut4DecoderBase {
  static constexpr int kMaxBytes = kCodeBytes + kChunkRows * kChunkColumns / 32 * 4;
  static constexpr bool kTable = true;

  const uint32_t* table = nullptr;  // of the calling lane: entries kBanks apart

  using Lut4DecoderBase::Lut4DecoderBase;

  int table_bytes(int) const { return 256 * kBanks * 4; }

  template <typename T>
  __device__ __forceinline__ void fill_table(void* smem, int64_t, int) {
    auto* words = static_cast<uint32_t*>(smem);
    for (int byte = threadIdx.x / kBanks; byte < 256; byte += blockDim.x / kBanks)
      words[byte * kBanks + threadIdx.x % kBanks] =
          round_pair<T>(codebook[byte & 15], codebook[byte >> 4]);
    table = words + threadIdx.x % kBanks;
  }

  template <typename T>
  struct Rows {};

  template <typename T>
  __device__ __forceinline__ void enter(Rows<T>&, const unsigned char*, int, int) const {}

  template <typename T>
  __device__ __forceinline__ void decode(uint32_t word, const Rows<T>&, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = table[(word >> (8 * i) & 255) * kBanks];
  }
};

struct ManyBooksDecoder : Lut4DecoderBase {
  static constexpr int kMaxBytes = OneBookDecoder::kMaxBytes + kChunkRows * 4 * 64;
  static constexpr bool kTable = true;
  static constexpr int kEntryStride = 17;  // floats from book to book of rows: other banks

  int64_t N;
  const float* table = nullptr;  // the CTA's rows' books

  explicit ManyBooksDecoder(const Lut4Weight& w) : Lut4DecoderBase(w), N(w.N) {}

  int table_bytes(int rows) const { return books_at ? 0 : rows * kEntryStride * 4; }

  template <typename T>
  __device__ __forceinline__ void fill_table(void* smem, int64_t first_n, int rows) {
    if (books_at) return;
    auto* books = static_cast<float*>(smem);
    for (int i = threadIdx.x; i < rows * 16; i += blockDim.x) {
      const int64_t n = first_n + i / 16;
      books[i / 16 * kEntryStride + i % 16] = n < N ? codebook[n * 16 + i % 16] : 0.0f;
    }
    table = books;
  }

  template <typename T>
  struct Rows {
    const float* book[2];
  };

  template <typename T>
  __device__ __forceinline__ void enter(Rows<T>& rows, const unsigned char* chunk, int group,
                                        int strip) const {
    const int g = threadIdx.x % 32 / 4;
    const float* books = reinterpret_cast<const float*>(chunk + books_at);
#pragma unroll
    for (int side = 0; side < 2; side++) {
      const int row = strip * 16 + g + side * 8;
      rows.book[side] = books_at ? books + (group * kChunkRows + row % kChunkRows) * 16
                                 : table + row * kEntryStride;
    }
  }

  template <typename T>
  __device__ __forceinline__ void decode(uint32_t word, const Rows<T>& rows,
                                         uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; i++)
      a[i] = round_pair<T>(rows.book[i % 2][word >> (8 * i) & 15],
                           rows.book[i % 2][word >> (8 * i + 4) & 15]);
  }
};

template <typename T>
void lut4_tensor_core(const Lut4GemmParams& p, const ChunkConfig& config, void* stream) {
  const ChunkGemmParams common = {p.x, p.w.qweight, p.bias, p.out, p.M, p.w.N, p.w.K, p.x_stride};
  if (p.w.book_row_stride)
    chunk_gemm<T>(common, CodeChunks<ManyBooksDecoder>(p.w), config, stream);
  else
    chunk_gemm<T>(common, CodeChunks<OneBookDecoder>(p.w), config, stream);
}

}  // namespace llmkern::cuda
