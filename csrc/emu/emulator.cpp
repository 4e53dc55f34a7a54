// Fortified longjmp refuses to leave one stack for another, which is what fibers do.
#undef _FORTIFY_SOURCE

#include "emu/emulator.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <iterator>
#include <mutex>
#include <set>
#include <stdexcept>

#include "emu/internal.h"

namespace llmkern::emu {
namespace {

constexpr size_t kStackBytes = 128 << 10;

jmp_buf scheduler;
Order order = Order::kForward;

// One stack per fiber with an unmapped page below it, kept from one launch to the next.
class Stacks {
 public:
  uint8_t* operator[](size_t i) {
    while (bases_.size() <= i) {
      const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
      void* base = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (base == MAP_FAILED || mprotect(base, page, PROT_NONE) != 0)
        throw std::runtime_error("emulator: no memory for thread stacks");
      bases_.push_back(static_cast<uint8_t*>(base) + page);
    }
    return bases_[i];
  }

 private:
  std::vector<uint8_t*> bases_;
};

Stacks stacks;

void fiber_main() {
  (*cluster.body)();
  check_copies_of_thread();
  running->state = State::kDone;
  _longjmp(scheduler, 1);
}

// Faults inside a kernel become errors: bad addresses, and the traps that the host build's
// sanitizer flags plant for misaligned vectors, bad array indices, shifts and signed overflow.
sigjmp_buf fault_return;

void on_fault(int signal_number, siginfo_t*, void*) { siglongjmp(fault_return, signal_number); }

class FaultHandlers {
 public:
  FaultHandlers() : stack_(64 << 10) {
    stack_t alternate = {};
    alternate.ss_sp = stack_.data();
    alternate.ss_size = stack_.size();
    sigaltstack(&alternate, &old_stack_);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (size_t i = 0; i < std::size(kSignals); i++) sigaction(kSignals[i], &action, &old_[i]);
  }
  ~FaultHandlers() {
    for (size_t i = 0; i < std::size(kSignals); i++) sigaction(kSignals[i], &old_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
  std::vector<uint8_t> stack_;
  stack_t old_stack_ = {};
  struct sigaction old_[std::size(kSignals)] = {};
};

void resume(Fiber& fiber) {
  running = &fiber;
  thread_index = fiber.index;
  block_index = fiber.block->index;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.entry);
}

void start_threads(Block& block, size_t first_stack) {
  const size_t threads = size_t{block_extent.x} * block_extent.y * block_extent.z;
  block.fibers.assign(threads, Fiber());
  for (size_t i = 0; i < threads; i++) {
    Fiber& fiber = block.fibers[i];
    const auto t = static_cast<unsigned>(i);
    fiber.block = &block;
    fiber.index = {t % block_extent.x, t / block_extent.x % block_extent.y,
                   t / (block_extent.x * block_extent.y)};
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = stacks[first_stack + i];
    fiber.entry.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.entry, fiber_main, 0);
  }
}

// Are all threads of the block waiting in `state` for the same call?
bool all_at(const Block& block, State state, Site site) {
  for (const Fiber& fiber : block.fibers)
    if (fiber.state != state || !same(fiber.site, site)) return false;
  return true;
}

void make_ready(Block& block) {
  for (Fiber& fiber : block.fibers) fiber.state = State::kReady;
}

bool open_barriers() {
  bool opened = false, all_at_cluster_barrier = true;
  const Site site = cluster.blocks[0].fibers[0].site;
  for (Block& block : cluster.blocks) {
    if (all_at(block, State::kAtBarrier, block.fibers[0].site)) {
      make_ready(block);
      opened = true;
    }
    all_at_cluster_barrier &= all_at(block, State::kAtClusterBarrier, site);
  }
  if (!all_at_cluster_barrier) return opened;
  for (Block& block : cluster.blocks) make_ready(block);
  return true;
}

// Who waits at a barrier, and who is not there.
std::string explain_barrier(const Fiber& waiting) {
  const bool whole_cluster = waiting.state == State::kAtClusterBarrier;
  for (const Block& block : cluster.blocks) {
    if (!whole_cluster && &block != waiting.block) continue;
    for (const Fiber& other : block.fibers) {
      if (other.state == waiting.state && same(other.site, waiting.site)) continue;
      return "divergent barrier: " + name(waiting) + " waits at " + text(waiting.site) + ", " +
             name(other) + (other.state == State::kDone ? " has ended" : " at " + text(other.site));
    }
  }
  return "";
}

// Why none of the threads that are left can go on: the first of each kind that waits, and of each
// mbarrier, since the one that lacks an arrival is seldom the first that somebody waits for.
std::string explain_deadlock() {
  std::string warp, mbarriers, barrier;
  std::set<const Mbarrier*> named;
  for (const Block& block : cluster.blocks)
    for (const Fiber& fiber : block.fibers) {
      if (fiber.state == State::kDone) continue;
      const std::string waits = name(fiber) + " waits at " + text(fiber.site);
      if (fiber.state == State::kAtWarpOperation && warp.empty())
        warp = "divergent warp: " + waits + " for lanes of its mask that never come there";
      if (fiber.state == State::kAtMbarrier && named.insert(fiber.mbarrier).second)
        mbarriers += (mbarriers.empty() ? "deadlock: " : "; ") + waits +
                     " for the phase of parity " + std::to_string(fiber.parity) + " of the " +
                     describe(block, *fiber.mbarrier);
      if ((fiber.state == State::kAtBarrier || fiber.state == State::kAtClusterBarrier) &&
          barrier.empty())
        barrier = explain_barrier(fiber);
    }
  std::string all = mbarriers;
  for (const std::string& part : {warp, barrier})
    if (!part.empty()) all += (all.empty() ? "" : "; ") + part;
  return all;
}

bool all_done() {
  for (const Block& block : cluster.blocks)
    for (const Fiber& fiber : block.fibers)
      if (fiber.state != State::kDone) return false;
  return true;
}

// Gives each thread that can go on its turn. False if there is none.
bool run_threads() {
  const size_t threads = cluster.blocks[0].fibers.size();
  const size_t all = cluster.blocks.size() * threads;
  bool progress = false;
  for (size_t step = 0; step < all; step++) {
    const size_t i = order == Order::kForward ? step : all - 1 - step;
    Fiber& fiber = cluster.blocks[i / threads].fibers[i % threads];
    if (fiber.state == State::kAtMbarrier && completed(*fiber.mbarrier, fiber.parity))
      fiber.state = State::kReady;
    if (fiber.state != State::kReady) continue;
    progress = true;
    resume(fiber);
    if (!cluster.error.empty()) throw std::runtime_error(cluster.error);
  }
  return progress;
}

// Copies land as late as they can: when every thread waits for something.
void run_cluster(uint64_t first_block) {
  const uint64_t layer = uint64_t{grid_extent.x} * grid_extent.y;
  cluster.blocks = std::vector<Block>(cluster.launch.cluster);
  for (size_t rank = 0; rank < cluster.blocks.size(); rank++) {
    const uint64_t b = first_block + rank;
    Block& block = cluster.blocks[rank];
    block.index = {static_cast<unsigned>(b % grid_extent.x),
                   static_cast<unsigned>(b / grid_extent.x % grid_extent.y),
                   static_cast<unsigned>(b / layer)};
    start_threads(block, rank * block_extent.x * block_extent.y * block_extent.z);
  }
  while (run_threads() || open_barriers() || land_awaited_copies()) continue;
  if (!all_done()) throw std::runtime_error(explain_deadlock());
  for (const Block& block : cluster.blocks) {
    check_guards(block);
    check_copies_of_block(block);
  }
}

void run_clusters() {
  const uint64_t blocks = uint64_t{grid_extent.x} * grid_extent.y * grid_extent.z;
  const uint64_t clusters = blocks / cluster.launch.cluster;
  for (uint64_t step = 0; step < clusters; step++)
    run_cluster((order == Order::kForward ? step : clusters - 1 - step) * cluster.launch.cluster);
}

}  // namespace

std::string text(Site site) {
  return site.line ? std::string(site.file) + ":" + std::to_string(site.line) : site.file;
}

std::string text(Index i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string name(const Fiber& fiber) {
  return "thread " + text(fiber.index) + " of block " + text(fiber.block->index);
}

void set_order(Order value) { order = value; }

void run_grid(const Launch& launch, const std::function<void()>& body) {
  static std::mutex one_launch;
  const std::lock_guard<std::mutex> lock(one_launch);
  grid_extent = launch.grid;
  block_extent = launch.block;
  cluster.launch = launch;
  cluster.body = &body;
  cluster.error.clear();
  const FaultHandlers handlers;
  if (const int signal_number = sigsetjmp(fault_return, 1)) {
    const bool address = signal_number == SIGSEGV || signal_number == SIGBUS;
    throw std::runtime_error(
        std::string(address ? "illegal memory access"
                            : "misaligned access, array index out of range or bad arithmetic") +
        " by " + name(*running));
  }
  run_clusters();
}

void yield() {
  if (_setjmp(running->resume) == 0) _longjmp(scheduler, 1);
}

void block_barrier(Site site) {
  running->state = State::kAtBarrier;
  running->site = site;
  yield();
}

void cluster_barrier(Site site) {
  running->state = State::kAtClusterBarrier;
  running->site = site;
  yield();
}

void warp_operation(uint32_t mask, Site site, WarpOperation run, void* args) {
  std::vector<Fiber>& fibers = running->block->fibers;
  const size_t thread = running - fibers.data();
  const size_t first = thread / 32 * 32;
  if (!(mask >> (thread - first) & 1)) fail("lane not in its own mask", site);
  running->state = State::kAtWarpOperation;
  running->site = site;
  running->mask = mask;
  running->run = run;
  running->args = args;
  void* lane_args[32] = {};
  for (size_t lane = 0; lane < 32; lane++) {
    if (!(mask >> lane & 1)) continue;
    if (first + lane >= fibers.size()) fail("mask names lanes past the block's end", site);
    const Fiber& fiber = fibers[first + lane];
    const bool arrived = fiber.state == State::kAtWarpOperation && fiber.mask == mask &&
                         fiber.run == run && same(fiber.site, site);
    if (!arrived) return yield();
    lane_args[lane] = fiber.args;
  }
  run(lane_args, mask);
  for (size_t lane = 0; lane < 32; lane++)
    if (mask >> lane & 1) fibers[first + lane].state = State::kReady;
}

void fail(const char* what, Site site) {
  cluster.error = std::string(what) + ": " + name(*running) + " at " + text(site);
  _longjmp(scheduler, 1);
}

}  // namespace llmkern::emu
