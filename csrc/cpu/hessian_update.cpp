#include "kernels.h"

namespace llmkern::LLMKERN_ISA {

void hessian_update(const HessianUpdateParams&) {}

}  // namespace llmkern::LLMKERN_ISA
