// What the emulator's own sources share: the state of the cluster that is running.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "emu/emulator.h"

namespace llmkern::emu {

// Shared memory that nobody has written: a NaN in every float type, a large negative integer. One
// that arithmetic never makes and that data hold by chance only (unlike all bits set, which is a
// word of codes 15).
constexpr uint16_t kPoison = 0xfff5;
constexpr uint32_t kPoisonWord = 0xfff5fff5;

enum class State { kReady, kAtBarrier, kAtClusterBarrier, kAtWarpOperation, kAtMbarrier, kDone };

// An asynchronous copy under way. Its source was read when it was issued; its destination holds
// poison until it lands.
struct Copy {
  uint8_t* to;
  std::vector<uint8_t> data;
  Site site;
};

struct Mbarrier {
  uint32_t count;    // arrivals that complete a phase
  uint32_t pending;  // arrivals that this phase still waits for
  int64_t tx;        // bytes that this phase still waits for
  uint32_t phase;    // phases completed
  bool fenced;       // the initialisation has been made visible to copies
  Index initialiser;
  Site site;
  std::vector<Copy> copies;  // issued, not yet landed
};

struct Block;

struct Fiber {
  jmp_buf resume;
  ucontext_t entry;
  bool started;
  State state;
  Block* block;
  Index index;
  Site site;
  uint32_t mask;
  WarpOperation run;
  void* args;
  const Mbarrier* mbarrier;  // waited for, until the phase of this parity has completed
  uint32_t parity;
  std::vector<Copy> copies;              // cp.async since the last commit
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
};

struct SharedArray {
  Site site;
  size_t bytes;
  std::vector<uint8_t> memory;  // guard, alignment slack, array, guard
  uint8_t* data;
};

struct Block {
  Index index;
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<SharedArray>> arrays;
  std::map<const void*, Mbarrier> mbarriers;
};

struct Cluster {
  std::vector<Block> blocks;
  Launch launch;
  const std::function<void()>* body;
  std::string error;
};

inline Cluster cluster;
inline Fiber* running;

inline bool same(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }
inline bool same(Index a, Index b) { return a.x == b.x && a.y == b.y && a.z == b.z; }
std::string text(Site site);
std::string text(Index index);
std::string name(const Fiber& fiber);

// Gives the other threads their turn; returns when the scheduler has made this one ready again.
void yield();

// Static and dynamic arrays (shared_memory.cpp).
void poison(void* from, size_t bytes);
bool poisoned(const void* from, size_t bytes);
// The array of `block` that holds all of [from, from + bytes), or null.
const SharedArray* find_array(const Block& block, const void* from, size_t bytes);
// Throws if a guard around one of the block's arrays was written.
void check_guards(const Block& block);

// Asynchronous copies (async_copy.cpp).
bool completed(const Mbarrier& mbarrier, uint32_t parity);
// Lands the copies of every mbarrier that a thread waits for. False if there were none.
bool land_awaited_copies();
// Ends the launch if the running thread leaves without having waited for its copies.
void check_copies_of_thread();
// Throws if a copy to the block's shared memory has not landed.
void check_copies_of_block(const Block& block);
// "mbarrier shared array ... + 8 bytes: phase ..."
std::string describe(const Block& block, const Mbarrier& mbarrier);

}  // namespace llmkern::emu
