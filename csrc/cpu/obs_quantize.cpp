// obs_quantize: the loop of cpu/obs_loop.h with every kept weight rounded, the mask given if any.
#include "cpu/kernels.h"
#include "cpu/obs_loop.h"

namespace llmkern::LLMKERN_ISA {

void obs_quantize(const ObsQuantizeParams& p) { run_loop(p, nullptr); }

}  // namespace llmkern::LLMKERN_ISA
