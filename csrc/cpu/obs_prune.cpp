// obs_prune: the loop of cpu/obs_loop.h with a mask chosen on the way, or given.
#include "cpu/kernels.h"
#include "cpu/obs_loop.h"

namespace llmkern::LLMKERN_ISA {

void obs_prune(const ObsPruneParams& p) { run_loop(p.loop, &p); }

}  // namespace llmkern::LLMKERN_ISA
