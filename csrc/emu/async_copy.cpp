// Copies that run beside the threads: cp.async with its groups, bulk copies with mbarriers; and
// what a cluster's blocks see of each other.
//
// A copy reads its source at once and poisons its destination; the data land when they are waited
// for and no thread can go on without them. So a read that did not wait finds poison, and so does a
// reader that a copy for the next round overtook.

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "emu/internal.h"
#include "emu/ptx.h"

namespace llmkern::emu {
namespace {

constexpr uint32_t kMaxCount = (1u << 20) - 1;  // of arrivals, and of bytes under way

bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

const char* const kOverwritten =
    "shared memory was written, or copied to, while an asynchronous copy to it was under way";

// False if somebody else wrote to the destination.
bool land(const Copy& copy) {
  if (!poisoned(copy.to, copy.data.size())) return false;
  std::memcpy(copy.to, copy.data.data(), copy.data.size());
  return true;
}

Copy issue(void* smem, const void* gmem, size_t bytes, bool valid, Site site) {
  if (!aligned(smem, 16) || !aligned(gmem, 16))
    fail("asynchronous copy: an address is not 16-byte aligned", site);
  if (!find_array(*running->block, smem, bytes))
    fail("asynchronous copy to what is not within one shared array of the block", site);
  Copy copy = {static_cast<uint8_t*>(smem), std::vector<uint8_t>(bytes), site};
  if (valid) std::memcpy(copy.data.data(), gmem, bytes);
  poison(smem, bytes);
  return copy;
}

void complete_if_due(Mbarrier& mbarrier) {
  if (mbarrier.pending != 0 || mbarrier.tx != 0) return;
  mbarrier.phase++;
  mbarrier.pending = mbarrier.count;
}

Mbarrier& find_mbarrier(const void* at, Site site) {
  auto& mbarriers = running->block->mbarriers;
  const auto found = mbarriers.find(at);
  if (found == mbarriers.end()) fail("mbarrier used before its initialisation", site);
  return found->second;
}

}  // namespace

void cp_async(void* smem, const void* gmem, bool valid, Site site) {
  running->copies.push_back(issue(smem, gmem, 16, valid, site));
}

void cp_async_commit() {
  running->groups.push_back(std::move(running->copies));
  running->copies.clear();
}

void cp_async_wait(size_t groups_left, Site site) {
  auto& groups = running->groups;
  for (; groups.size() > groups_left; groups.pop_front())
    for (const Copy& copy : groups.front())
      if (!land(copy)) fail(kOverwritten, site);
}

void check_copies_of_thread() {
  const std::vector<Copy>* left = &running->copies;
  for (const auto& group : running->groups)
    if (!group.empty()) left = &group;
  if (!left->empty()) fail("a thread ended before its cp.async had completed", (*left)[0].site);
}

void mbarrier_init(const void* mbarrier, uint32_t count, Site site) {
  Block& block = *running->block;
  if (!aligned(mbarrier, 8) || !find_array(block, mbarrier, 8))
    fail("mbarrier: expected 8 aligned bytes of the block's shared memory", site);
  if (count < 1 || count > kMaxCount) fail("mbarrier: its count is not in 1..2^20-1", site);
  const Mbarrier fresh = {count, count, 0, 0, false, running->index, site, {}};
  if (!block.mbarriers.emplace(mbarrier, fresh).second) fail("mbarrier initialised twice", site);
}

void mbarrier_init_fence() {
  for (auto& [at, mbarrier] : running->block->mbarriers)
    if (same(mbarrier.initialiser, running->index)) mbarrier.fenced = true;
}

void mbarrier_arrive(const void* at, uint32_t expected_bytes, Site site) {
  Mbarrier& mbarrier = find_mbarrier(at, site);
  if (mbarrier.pending == 0) fail("more arrivals at an mbarrier than its count", site);
  mbarrier.tx += expected_bytes;
  if (mbarrier.tx > kMaxCount) fail("mbarrier: more than 2^20-1 bytes expected in a phase", site);
  mbarrier.pending--;
  complete_if_due(mbarrier);
}

void mbarrier_wait(const void* at, uint32_t parity, Site site) {
  const Mbarrier& mbarrier = find_mbarrier(at, site);
  if (parity > 1) fail("mbarrier: a parity is 0 or 1", site);
  if (completed(mbarrier, parity)) return;
  running->state = State::kAtMbarrier;
  running->site = site;
  running->mbarrier = &mbarrier;
  running->parity = parity;
  yield();
}

void bulk_copy(void* smem, const void* gmem, uint32_t bytes, const void* at, Site site) {
  Mbarrier& mbarrier = find_mbarrier(at, site);
  if (!mbarrier.fenced) fail("bulk copy before the mbarrier's mbarrier_init_fence()", site);
  if (bytes == 0 || bytes % 16 != 0) fail("bulk copy: its size is no multiple of 16 bytes", site);
  mbarrier.copies.push_back(issue(smem, gmem, bytes, true, site));
}

// The current phase is the one of the other parity once that of `parity` has completed.
bool completed(const Mbarrier& mbarrier, uint32_t parity) { return (mbarrier.phase & 1) != parity; }

bool land_awaited_copies() {
  bool landed = false;
  for (Block& block : cluster.blocks)
    for (auto& [at, mbarrier] : block.mbarriers) {
      const auto waits = [&mbarrier = mbarrier](const Fiber& fiber) {
        return fiber.state == State::kAtMbarrier && fiber.mbarrier == &mbarrier;
      };
      if (mbarrier.copies.empty() || !std::any_of(block.fibers.begin(), block.fibers.end(), waits))
        continue;
      for (const Copy& copy : mbarrier.copies) {
        if (!land(copy))
          throw std::runtime_error(std::string(kOverwritten) + ": copy issued at " +
                                   text(copy.site) + ", block " + text(block.index));
        mbarrier.tx -= static_cast<int64_t>(copy.data.size());
      }
      mbarrier.copies.clear();
      complete_if_due(mbarrier);
      landed = true;
    }
  return landed;
}

void check_copies_of_block(const Block& block) {
  for (const auto& [at, mbarrier] : block.mbarriers)
    if (!mbarrier.copies.empty())
      throw std::runtime_error(
          "block " + text(block.index) +
          " ended before its bulk copy had completed: " + text(mbarrier.copies[0].site));
}

std::string describe(const Block& block, const Mbarrier& mbarrier) {
  std::string where;
  for (const auto& [at, candidate] : block.mbarriers) {
    if (&candidate != &mbarrier) continue;
    const SharedArray& array = *find_array(block, at, 8);
    where = text(array.site) + " + " +
            std::to_string(static_cast<const uint8_t*>(at) - array.data) + " bytes";
  }
  return "mbarrier " + where + ": " + std::to_string(mbarrier.phase) +
         " phases completed, this one lacks " + std::to_string(mbarrier.pending) + " of " +
         std::to_string(mbarrier.count) + " arrivals and " + std::to_string(mbarrier.tx) + " bytes";
}

uint32_t cluster_rank() { return static_cast<uint32_t>(running->block - cluster.blocks.data()); }

uint32_t cluster_size() { return cluster.launch.cluster; }

const void* cluster_address(const void* smem, size_t bytes, uint32_t rank, Site site) {
  const SharedArray* mine = find_array(*running->block, smem, bytes);
  if (!mine) fail("cluster: the address is not in the block's shared memory", site);
  if (rank >= cluster.blocks.size()) fail("cluster: no block of this rank", site);
  const Block& other = cluster.blocks[rank];
  const auto done = [](const Fiber& fiber) { return fiber.state == State::kDone; };
  if (std::all_of(other.fibers.begin(), other.fibers.end(), done))
    fail("cluster: read from the shared memory of a block that has ended", site);
  const size_t offset = static_cast<const uint8_t*>(smem) - mine->data;
  for (const auto& array : other.arrays)
    if (same(array->site, mine->site)) return array->data + offset;
  fail("cluster: read from the shared memory of a block that has not begun", site);
}

}  // namespace llmkern::emu
