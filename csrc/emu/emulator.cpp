// Fortified longjmp refuses to leave one stack for another, which is what fibers do.
#undef _FORTIFY_SOURCE

#include "emu/emulator.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstring>
#include <iterator>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace llmkern::emu {
namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kGuardBytes = 1024;  // on each side of a shared array
constexpr size_t kMaxSharedBytes = 48 << 10;
constexpr uint8_t kPoison = 0xff;        // a NaN in every float type, -1 in integers
constexpr uint16_t kGuardWord = 0x7ff3;  // another NaN in every float type

enum class State { kReady, kAtBarrier, kAtWarpOperation, kDone };

struct Fiber {
  jmp_buf resume;
  ucontext_t entry;
  bool started;
  State state;
  Index index;
  Site site;
  uint32_t mask;
  WarpOperation run;
  void* args;
};

struct SharedArray {
  Site site;
  size_t bytes;
  std::vector<uint8_t> memory;  // guard, alignment slack, array, guard
  uint8_t* data;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<SharedArray>> arrays;
  size_t dynamic_bytes;
  const std::function<void()>* body;
  std::string error;
};

Block block;
Fiber* running;
jmp_buf scheduler;
Order order = Order::kForward;

bool same(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

std::string text(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

std::string text(Index i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string here(const Fiber& fiber) {
  return "thread " + text(fiber.index) + " of block " + text(block_index);
}

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

void yield() {
  if (_setjmp(running->resume) == 0) _longjmp(scheduler, 1);
}

void fiber_main() {
  (*block.body)();
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
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.entry);
}

void start_threads() {
  const size_t threads = size_t{block_extent.x} * block_extent.y * block_extent.z;
  block.fibers.assign(threads, Fiber());
  for (size_t i = 0; i < threads; i++) {
    Fiber& fiber = block.fibers[i];
    const auto t = static_cast<unsigned>(i);
    fiber.index = {t % block_extent.x, t / block_extent.x % block_extent.y,
                   t / (block_extent.x * block_extent.y)};
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = stacks[i];
    fiber.entry.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.entry, fiber_main, 0);
  }
}

// Every thread is blocked or done: opens the barrier, or says who is missing. False if all are
// done.
bool open_barrier() {
  const Fiber *waiting = nullptr, *done = nullptr;
  for (const Fiber& fiber : block.fibers) {
    if (fiber.state == State::kDone) done = &fiber;
    if (fiber.state == State::kAtWarpOperation)
      throw std::runtime_error("divergent warp: " + here(fiber) + " waits at " + text(fiber.site) +
                               " for lanes of its mask that never come there");
    if (fiber.state != State::kAtBarrier) continue;
    if (waiting && !same(waiting->site, fiber.site))
      throw std::runtime_error("divergent barrier: " + here(*waiting) + " waits at " +
                               text(waiting->site) + ", " + here(fiber) + " at " +
                               text(fiber.site));
    waiting = &fiber;
  }
  if (!waiting) return false;
  if (done)
    throw std::runtime_error("divergent barrier: " + here(*waiting) + " waits at " +
                             text(waiting->site) + ", " + here(*done) + " has ended");
  for (Fiber& fiber : block.fibers) fiber.state = State::kReady;
  return true;
}

void check_guards() {
  for (const auto& array : block.arrays) {
    auto* before = reinterpret_cast<const uint16_t*>(array->data - kGuardBytes);
    auto* after = reinterpret_cast<const uint16_t*>(array->data + (array->bytes + 1) / 2 * 2);
    for (size_t i = 0; i < kGuardBytes / 2; i++) {
      if (before[i] == kGuardWord && after[i] == kGuardWord) continue;
      throw std::runtime_error("write outside the shared array declared at " + text(array->site) +
                               ", block " + text(block_index));
    }
  }
}

void run_block() {
  block.arrays.clear();
  start_threads();
  const size_t threads = block.fibers.size();
  bool progress = true;
  while (progress || open_barrier()) {
    progress = false;
    for (size_t i = 0; i < threads; i++) {
      Fiber& fiber = block.fibers[order == Order::kForward ? i : threads - 1 - i];
      if (fiber.state != State::kReady) continue;
      progress = true;
      resume(fiber);
      if (!block.error.empty()) throw std::runtime_error(block.error);
    }
  }
  check_guards();
}

void run_blocks() {
  const uint64_t blocks = uint64_t{grid_extent.x} * grid_extent.y * grid_extent.z;
  for (uint64_t step = 0; step < blocks; step++) {
    const uint64_t b = order == Order::kForward ? step : blocks - 1 - step;
    const uint64_t layer = uint64_t{grid_extent.x} * grid_extent.y;
    block_index = {static_cast<unsigned>(b % grid_extent.x),
                   static_cast<unsigned>(b / grid_extent.x % grid_extent.y),
                   static_cast<unsigned>(b / layer)};
    run_block();
  }
}

}  // namespace

void set_order(Order value) { order = value; }

void run_grid(Extent grid, Extent extent, size_t dynamic_shared_bytes,
              const std::function<void()>& body) {
  static std::mutex one_launch;
  const std::lock_guard<std::mutex> lock(one_launch);
  grid_extent = grid;
  block_extent = extent;
  block.body = &body;
  block.dynamic_bytes = dynamic_shared_bytes;
  block.error.clear();
  const FaultHandlers handlers;
  if (const int signal_number = sigsetjmp(fault_return, 1)) {
    const bool address = signal_number == SIGSEGV || signal_number == SIGBUS;
    throw std::runtime_error(
        std::string(address ? "illegal memory access"
                            : "misaligned access, array index out of range or bad arithmetic") +
        " by " + here(*running));
  }
  run_blocks();
}

void block_barrier(Site site) {
  running->state = State::kAtBarrier;
  running->site = site;
  yield();
}

void warp_operation(uint32_t mask, Site site, WarpOperation run, void* args) {
  const size_t thread = running - block.fibers.data();
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
    if (first + lane >= block.fibers.size()) fail("mask names lanes past the block's end", site);
    const Fiber& fiber = block.fibers[first + lane];
    const bool arrived = fiber.state == State::kAtWarpOperation && fiber.mask == mask &&
                         fiber.run == run && same(fiber.site, site);
    if (!arrived) return yield();
    lane_args[lane] = fiber.args;
  }
  run(lane_args, mask);
  for (size_t lane = 0; lane < 32; lane++)
    if (mask >> lane & 1) block.fibers[first + lane].state = State::kReady;
}

void fail(const char* what, Site site) {
  block.error = std::string(what) + ": " + here(*running) + " at " + text(site);
  _longjmp(scheduler, 1);
}

void* shared_array(Site site, size_t bytes) {
  size_t total = bytes;
  for (const auto& array : block.arrays) {
    if (same(array->site, site)) return array->data;
    total += array->bytes;
  }
  if (total > kMaxSharedBytes) fail("more than 48 KB of shared memory", site);
  auto array = std::make_unique<SharedArray>();
  array->site = site;
  array->bytes = bytes;
  array->memory.resize(2 * kGuardBytes + bytes + 32);
  const auto start = reinterpret_cast<uintptr_t>(array->memory.data()) + kGuardBytes;
  array->data = reinterpret_cast<uint8_t*>((start + 15) / 16 * 16);
  auto* after = array->data + (bytes + 1) / 2 * 2;
  for (size_t i = 0; i < kGuardBytes; i += 2) {
    std::memcpy(array->data - kGuardBytes + i, &kGuardWord, 2);
    std::memcpy(after + i, &kGuardWord, 2);
  }
  std::memset(array->data, kPoison, bytes);
  block.arrays.push_back(std::move(array));
  return block.arrays.back()->data;
}

void* dynamic_shared() { return shared_array({"dynamic shared memory", 0}, block.dynamic_bytes); }

}  // namespace llmkern::emu
