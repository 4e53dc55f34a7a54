// Blocks of work [0, count) for the threads of a team. Each walks a contiguous share of its own in
// ascending order, so that what it prefetches beyond a block's end is what it reads next, and then
// takes blocks from the ends of the others' shares: no thread waits long for a slower one.
#pragma once

#include <cstdint>

#include "cpu/common/integers.h"

namespace llmkern::LLMKERN_ISA {
namespace {

class Shares {
 public:
  Shares(int64_t count, int threads) : shares_(threads < kMost ? threads : kMost) {
    for (int s = 0; s < shares_; ++s)
      rest_[s].range = pack(s * count / shares_, (s + 1) * count / shares_);
  }

  // The next block of thread `thread`; -1 at the end.
  int64_t next(int thread) {
    for (int i = 0; i < shares_; ++i) {
      uint64_t* at = &rest_[(thread + i) % shares_].range;
      uint64_t range = __atomic_load_n(at, __ATOMIC_RELAXED);
      while (first(range) < last(range)) {
        const int64_t block = i == 0 ? first(range) : last(range) - 1;
        const uint64_t left = i == 0 ? pack(block + 1, last(range)) : pack(first(range), block);
        if (__atomic_compare_exchange_n(at, &range, left, false, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED))
          return block;
      }
    }
    return -1;
  }

 private:
  static constexpr int kMost = 64;
  struct alignas(64) Share {  // on a cache line of its own
    uint64_t range;
  };

  static uint64_t pack(int64_t first, int64_t last) {
    return uint64_t(last) << 32 | uint64_t(first);
  }
  static int64_t first(uint64_t range) { return int64_t(range & 0xffffffff); }
  static int64_t last(uint64_t range) { return int64_t(range >> 32); }

  const int shares_;
  Share rest_[kMost];
};

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
