// Arithmetic of sizes.
#pragma once

#include <cstdint>

namespace llmkern::LLMKERN_ISA {
namespace {

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
