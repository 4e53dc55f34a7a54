// Intel AMX tiles: wrappers whose memory clobbers keep the compiler from moving the stores that
// fill an operand past the tile load (GCC's own intrinsics for loads have none).
#pragma once

#ifdef __AMX_INT8__
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace llmkern::LLMKERN_ISA {
namespace {

// Tile registers are part of the instruction, hence template parameters.
template <int T>
inline void tile_load(const void* from, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(T) : "memory");
}

template <int T>
inline void tile_store(void* to, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(T) : "memory");
}

template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}

// C[i, j] += sum over four bytes: A[i, 4k ..] * B[k, 4j ..], both signed.
template <int C, int A, int B>
inline void tile_dot() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Likewise over two bfloat16, in float32.
template <int C, int A, int B>
inline void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

constexpr int64_t kTileRows = 16;

struct TileShape {
  int64_t rows, row_bytes;
};

// Shapes of the tile registers of the calling thread, until the end of the scope.
class TileConfig {
 public:
  explicit TileConfig(const TileShape (&shapes)[8]) {
    alignas(64) uint8_t config[64] = {1};  // palette 1: eight tiles of up to 16 rows of 64 bytes
    for (int t = 0; t < 8; ++t) {
      const uint16_t row_bytes = uint16_t(shapes[t].row_bytes);
      memcpy(config + 16 + 2 * t, &row_bytes, 2);
      config[48 + t] = uint8_t(shapes[t].rows);
    }
    asm volatile("ldtilecfg (%0)" ::"r"(config) : "memory");
  }
  ~TileConfig() { asm volatile("tilerelease"); }
  TileConfig(const TileConfig&) = delete;
  TileConfig& operator=(const TileConfig&) = delete;
};

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
#endif
