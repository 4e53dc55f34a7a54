// Runs a CUDA grid on the host: clusters one after another, the threads of a cluster's blocks as
// fibers that switch at barriers and warp operations only. See README.md for what that can and
// cannot show.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <type_traits>

namespace llmkern::emu {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Extent {
  unsigned x, y, z;
  Extent(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// The running thread's coordinates; the scheduler sets them at each switch.
inline Index thread_index, block_index;
inline Extent block_extent, grid_extent;

// Where in a kernel's source an operation was called.
struct Site {
  const char* file;
  int line;
};

// Order in which the threads of a cluster, and the clusters of a grid, run between barriers. A
// kernel without races gives the same bits in each.
enum class Order { kForward, kReverse };
void set_order(Order order);

struct Launch {
  Extent grid, block;
  unsigned cluster = 1;             // blocks, along x
  size_t dynamic_shared_bytes = 0;  // per block
  size_t max_shared_bytes = 0;      // per block, static arrays included
};

// Calls body() once per thread. Throws std::runtime_error on whatever of README.md's list goes
// wrong.
void run_grid(const Launch& launch, const std::function<void()>& body);

// __syncthreads(): every thread of the block must come to the same call.
void block_barrier(Site site);

// The same for every thread of the cluster.
void cluster_barrier(Site site);

// An operation of the lanes in `mask` of a warp: waits until each of them has come to the same
// call, then run(args, mask) is called once with every lane's arguments (null for lanes outside the
// mask). Shuffles, votes, __syncwarp and the matrix instructions are made of it.
using WarpOperation = void (*)(void* const* args, uint32_t mask);
void warp_operation(uint32_t mask, Site site, WarpOperation run, void* args);

// The running thread's place in its warp.
inline int lane() {
  return (thread_index.x + block_extent.x * (thread_index.y + block_extent.y * thread_index.z)) %
         32;
}

// Ends the launch with an error raised by the running thread.
[[noreturn]] void fail(const char* what, Site site);

// The block's array declared at `site`, poisoned and guarded on both sides.
void* shared_array(Site site, size_t bytes);

// The block's dynamic shared memory, likewise.
void* dynamic_shared();

template <typename Array>
Array& shared(Site site) {
  static_assert(std::is_trivially_copyable_v<std::remove_all_extents_t<Array>>);
  return *static_cast<Array*>(shared_array(site, sizeof(Array)));
}

}  // namespace llmkern::emu
