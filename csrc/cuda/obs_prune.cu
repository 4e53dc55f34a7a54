// obs_prune, one block of up to 128 columns: the template of obs_block.cuh with nothing to round
// to, or with a mask that it chooses, n of every m columns.

#include "cuda/obs_block.cuh"

namespace llmkern::cuda {

void obs_prune_block(const ObsBlockParams& p, void* stream) {
  if (!p.size) return launch_obs_block<ObsGrid::kNone, ObsMask::kGiven>(p, stream);
  if (!p.codes) return launch_obs_block<ObsGrid::kNone, ObsMask::kOfEvery>(p, stream);
  if (p.codebook) return launch_obs_block<ObsGrid::kBook, ObsMask::kOfEvery>(p, stream);
  launch_obs_block<ObsGrid::kInteger, ObsMask::kOfEvery>(p, stream);
}

}  // namespace llmkern::cuda
