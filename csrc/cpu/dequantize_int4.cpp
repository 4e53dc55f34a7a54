#include "kernels.h"

namespace llmkern::LLMKERN_ISA {

void dequantize_int4(const DequantizeInt4Params&) {}

}  // namespace llmkern::LLMKERN_ISA
