// obs_quantize, one block of up to 128 columns: the template of obs_block.cuh on integer grids and
// books, with and without a mask.

#include "cuda/obs_block.cuh"

namespace llmkern::cuda {
namespace {

template <ObsGrid GRID>
void quantize_block(const ObsBlockParams& p, void* stream) {
  if (p.mask) return launch_obs_block<GRID, ObsMask::kGiven>(p, stream);
  launch_obs_block<GRID, ObsMask::kNone>(p, stream);
}

}  // namespace

void obs_block(const ObsBlockParams& p, void* stream) {
  if (!p.codes || p.size) return obs_prune_block(p, stream);
  if (p.codebook) return quantize_block<ObsGrid::kBook>(p, stream);
  quantize_block<ObsGrid::kInteger>(p, stream);
}

}  // namespace llmkern::cuda
