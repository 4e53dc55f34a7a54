#include "kernels.h"

namespace llmkern::LLMKERN_ISA {

void w4a16_gemm(const W4A16GemmParams&) {}

}  // namespace llmkern::LLMKERN_ISA
