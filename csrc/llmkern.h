// The C++ interface of all kernels: one POD parameter struct and one launch function per op and
// backend. Raw pointers, sizes and (on CUDA) a stream; nothing here or below knows torch.
//
// Sizes are in elements unless a name says bytes. Matrices are row-major and dense unless a stride
// is given. Callers have checked every argument: kernels neither check nor allocate caller-visible
// memory.
#pragma once

#include <cstdint>
#include <tuple>

// Names all fields of a struct in their order, for csrc/bindings.h, which fills it by name; one too
// few does not compile. Where a field is a struct, its fields take its place.
#define LLMKERN_FIELDS(Struct, ...)                                      \
  inline const char* field_names(const Struct&) { return #__VA_ARGS__; } \
  inline auto fields(Struct& params) {                                   \
    auto& [__VA_ARGS__] = params;                                        \
    return std::tie(__VA_ARGS__);                                        \
  }

// Names the values of an enum from 0 on, as Python gives them.
#define LLMKERN_VALUES(Enum, ...) \
  inline const char* value_names(Enum) { return #__VA_ARGS__; }

namespace llmkern {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };
LLMKERN_VALUES(DType, float32, bfloat16, float16)

// Of a compressed weight; the pictures are in llmkern/formats/.
enum class Layout : int32_t { kCanonical, kCpu, kCuda };
LLMKERN_VALUES(Layout, canonical, cpu, cuda)

struct Int4Weight {
  const void* qweight;
  const void* scales;  // canonical [N, K/group_size], cpu [K/group_size, N]
  const void* zeros;   // canonical: packed int32 [ceil(N/8), K/group_size]; cpu: uint8
                       // [K/group_size, N]; cuda: not null if the chunks of qweight hold
                       // them, as they do the scales; null: the constant 8
  int64_t N, K, group_size;
  DType scales_dtype;
  Layout layout;
};
LLMKERN_FIELDS(Int4Weight, qweight, scales, zeros, N, K, group_size, scales_dtype, layout)

// out[m, n] = sum_k x[m, k] * w[n, k] + bias[n]
struct W4A16GemmParams {
  const void* x;  // [M, K], row stride x_stride, unit column stride
  Int4Weight w;
  const void* bias;  // [N] in dtype, or null
  void* out;         // [M, N]
  int64_t M, x_stride;
  DType dtype;                   // of x, bias and out
  bool int8_activation = false;  // x rounded to 8 bits per row first; CPU only
};
LLMKERN_FIELDS(W4A16GemmParams, x, w, bias, out, M, x_stride, dtype, int8_activation)

// out[n, k] = scales * (codes - zeros)
struct DequantizeInt4Params {
  Int4Weight w;
  void* out;  // [N, K]
  DType dtype;
};
LLMKERN_FIELDS(DequantizeInt4Params, w, out, dtype)

// w[n, k] = scales[n, k / group_size] * codebook[.., codes[n, k]]
struct Lut4Weight {
  const void* qweight;
  const float* codebook;  // 16 entries for row n, group g at n * book_row_stride + g *
                          // book_group_stride; both 0 for one book. cuda: not read if groups
                          // have books, which the chunks of qweight hold
  const void* scales;     // [N, K/group_size], or null: 1; cuda: not null if the chunks of
                          // qweight hold them
  int64_t N, K, group_size, book_row_stride, book_group_stride;
  DType scales_dtype;
  Layout layout;
};
LLMKERN_FIELDS(Lut4Weight, qweight, codebook, scales, N, K, group_size, book_row_stride,
               book_group_stride, scales_dtype, layout)

// out[m, n] = sum_k x[m, k] * w[n, k] + bias[n]
struct Lut4GemmParams {
  const void* x;  // [M, K], row stride x_stride, unit column stride
  Lut4Weight w;
  const void* bias;  // [N] in dtype, or null
  void* out;         // [M, N]
  int64_t M, x_stride;
  DType dtype;  // of x, bias and out
};
LLMKERN_FIELDS(Lut4GemmParams, x, w, bias, out, M, x_stride, dtype)

// out[m, n] = sum_k x[m, k] * w[n, k] + bias[n], w zero but for two of every 4 columns
struct Sparse24GemmParams {
  const void* x;       // [M, K], row stride x_stride, unit column stride
  const void* values;  // the kept values
  const void* meta;    // which columns they are; not read on CUDA, as in the next struct
  const void* bias;    // [N], or null
  void* out;           // [M, N]
  int64_t M, N, K, x_stride;
  DType dtype;  // of x, values, bias and out
  Layout layout;
};
LLMKERN_FIELDS(Sparse24GemmParams, x, values, meta, bias, out, M, N, K, x_stride, dtype, layout)

// The same with w = scales * (codes - zeros) where kept.
struct Sparse24W4A16GemmParams {
  const void* x;        // [M, K], row stride x_stride, unit column stride
  const void* qvalues;  // the kept codes
  const void* meta;     // which columns they are
  const void* scales;   // canonical [N, K/group_size], cpu [K/group_size, N]
  const void* zeros;    // canonical: packed int32 [ceil(N/8), K/group_size]; cpu: uint8
                        // [K/group_size, N]; cuda: not null if the chunks of qvalues hold
                        // them, as they do the scales; null: the constant 8
  const void* bias;     // [N] in dtype, or null
  void* out;            // [M, N]
  int64_t M, N, K, x_stride, group_size;
  DType dtype, scales_dtype;
  Layout layout;
};
LLMKERN_FIELDS(Sparse24W4A16GemmParams, x, qvalues, meta, scales, zeros, bias, out, M, N, K,
               x_stride, group_size, dtype, scales_dtype, layout)

struct DequantizeLut4Params {
  Lut4Weight w;
  void* out;  // [N, K]
  DType dtype;
};
LLMKERN_FIELDS(DequantizeLut4Params, w, out, dtype)

// lower triangle of H[e, i, j] += alpha * sum_t x[t, i] * x[t, j] over the rows t of expert e
struct HessianUpdateParams {
  float* H;       // [E, K, K]
  const void* x;  // [E, T, K]; with offsets [T, K]
  int64_t T, K;
  double alpha;
  DType dtype;
  int64_t E = 1;                     // CPU: 1
  const int64_t* offsets = nullptr;  // [E + 1]: expert e has rows offsets[e]..offsets[e + 1] - 1
};
LLMKERN_FIELDS(HessianUpdateParams, H, x, T, K, alpha, dtype, E, offsets)

// H, with its diagonal replaced, over the columns taken in `order`, as (U diag(d)) (U diag(d))ᵀ, U
// unit upper triangular.
struct HessianFactorParams {
  const float* H;         // [K, K], strict lower triangle read
  const float* diagonal;  // [K], in the original order
  const int64_t* order;   // [K], the original column at each position; null: the natural order
  float* U;               // [K, K], zero below the diagonal
  float* d;               // [K]
  int64_t K;
};
LLMKERN_FIELDS(HessianFactorParams, H, diagonal, order, U, d, K)

// The column loop of llmkern/reference/obs_quantize.py over a whole matrix.
struct ObsQuantizeParams {
  const float* w;        // [N, K], columns in the order in which they are visited
  const float* U;        // [K, K], strict upper triangle read
  const float* d;        // [K]
  const int32_t* g_idx;  // [K]
  uint8_t* codes;        // [N, K]
  float* scales;         // [N, K/group_size]; read unless dynamic, else written
  float* zeros;          // [N, K/group_size]; likewise
  float* w_hat;          // [N, K]
  float* loss;           // [N]
  int64_t N, K, group_size;
  int32_t bits;
  bool dynamic, symmetric, clip_search;
  DType scales_dtype;             // scales are rounded to it
  const uint8_t* mask = nullptr;  // [N, K], 0 = pruned, or null: none is
  // Null: integers. Else 16 ascending entries for row n, group g at n * book_row_stride + g *
  // book_group_stride; codes are then ranks among them.
  const float* codebook = nullptr;
  int64_t book_row_stride = 0, book_group_stride = 0;
};
LLMKERN_FIELDS(ObsQuantizeParams, w, U, d, g_idx, codes, scales, zeros, w_hat, loss, N, K,
               group_size, bits, dynamic, symmetric, clip_search, scales_dtype, mask, codebook,
               book_row_stride, book_group_stride)

// The same loop with a mask that is chosen on the way, as llmkern/reference/obs_prune.py does.
struct ObsPruneParams {
  ObsQuantizeParams loop;  // codes null: what is kept is not rounded, and nothing of a grid is read
  uint8_t* chosen;         // [N, K], written unless loop.mask is given: 1 = kept
  double sparsity;         // fraction that goes if size is 0,
  bool per_row;            // of each row or of all
  int64_t kept, size;      // columns kept of every `size`, or 0 and 0
};
LLMKERN_FIELDS(ObsPruneParams, loop, chosen, sparsity, per_row, kept, size)

// Columns first..last-1 of that loop and of llmkern/reference/obs_prune.py's, as
// llmkern/ops/_obs_blocks.py launches them: `work` holds the updated weights and gets the values
// chosen for them.
struct ObsBlockParams {
  const float* w;         // [E, N, K], columns in visiting order
  const float* U;         // [E, K, K], strict upper triangle read
  const float* d;         // [E, K]
  const int32_t* g_idx;   // [E, K]
  const float* codebook;  // 16 ascending entries, or null: integers
  const float* scales;    // [E, N, groups]
  const float* zeros;     // [E, N, groups]
  uint8_t* mask;          // [E, N, K], 1 = kept; written if size, else read, null: all
  uint8_t* codes;         // [E, N, K]; null: nothing is rounded, and no grid is read
  float* work;            // [E, N, work_stride]; the block is columns work_first, ...
  float* loss;            // [E, N], added to, or null
  float* error;           // [E, N, error_stride]: w minus what was chosen
  int64_t E, N, K, groups;
  int64_t book_expert, book_row, book_group;  // strides of codebook, 0 where it is the same
  int64_t first, last, work_first, work_stride, error_stride;
  int32_t bits, kept, size;  // size: choose the best `kept` of every `size` columns, or 0
};
LLMKERN_FIELDS(ObsBlockParams, w, U, d, g_idx, codebook, scales, zeros, mask, codes, work, loss,
               error, E, N, K, groups, book_expert, book_row, book_group, first, last, work_first,
               work_stride, error_stride, bits, kept, size)

// mask = False for the `removed` lowest (reached * d)^2 of the N x columns of each expert, or of
// each row; of equal ones the lower column goes first, then the lower row. 0 < removed < how many
// there are.
struct ObsSelectParams {
  const float* reached;  // [E, N, columns], at most 128 columns
  const float* d;        // [E, columns], stride d_stride
  uint8_t* mask;         // [E, N, columns], row stride mask_stride
  uint32_t* keys;        // [E, columns, N]; scratch, unless per_row
  uint32_t* counts;      // [E, counts_stride]; zeros, unless per_row
  int64_t E, N, columns, d_stride, mask_stride, counts_stride, removed;
  bool per_row;
};
LLMKERN_FIELDS(ObsSelectParams, reached, d, mask, keys, counts, E, N, columns, d_stride,
               mask_stride, counts_stride, removed, per_row)

}  // namespace llmkern
