#include "kernels.h"

namespace llmkern::LLMKERN_ISA {

void obs_quantize(const ObsQuantizeParams&) {}

}  // namespace llmkern::LLMKERN_ISA
