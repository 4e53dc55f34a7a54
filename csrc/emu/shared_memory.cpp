// Shared memory of the emulated blocks: poisoned before use, guarded on both sides, limited as on a
// GPU.

#include <cstring>
#include <stdexcept>

#include "emu/internal.h"

namespace llmkern::emu {
namespace {

constexpr size_t kGuardBytes = 1024;     // on each side of an array
constexpr uint16_t kGuardWord = 0x7ff3;  // a NaN in every float type, and not the poison
constexpr size_t kMaxStaticBytes = 48 << 10;
const char* const kDynamic = "dynamic shared memory";

void fill(void* from, uint16_t word, size_t bytes) {
  auto* to = static_cast<uint8_t*>(from);
  for (size_t i = 0; i < bytes; i += 2) std::memcpy(to + i, &word, i + 1 < bytes ? 2 : 1);
}

uint8_t* end_of(const SharedArray& array) { return array.data + (array.bytes + 1) / 2 * 2; }

}  // namespace

void poison(void* from, size_t bytes) { fill(from, kPoison, bytes); }

bool poisoned(const void* from, size_t bytes) {
  const auto* at = static_cast<const uint8_t*>(from);
  for (size_t i = 0; i < bytes; i += 2)
    if (std::memcmp(at + i, &kPoison, i + 1 < bytes ? 2 : 1) != 0) return false;
  return true;
}

const SharedArray* find_array(const Block& block, const void* from, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(from);
  for (const auto& array : block.arrays) {
    const auto start = reinterpret_cast<uintptr_t>(array->data);
    if (first >= start && first + bytes <= start + array->bytes) return array.get();
  }
  return nullptr;
}

void check_guards(const Block& block) {
  for (const auto& array : block.arrays) {
    const uint8_t *before = array->data - kGuardBytes, *after = end_of(*array);
    for (size_t i = 0; i < kGuardBytes; i += 2) {
      if (std::memcmp(before + i, &kGuardWord, 2) == 0 &&
          std::memcmp(after + i, &kGuardWord, 2) == 0)
        continue;
      throw std::runtime_error("write outside the shared array declared at " + text(array->site) +
                               ", block " + text(block.index));
    }
  }
}

void* shared_array(Site site, size_t bytes) {
  Block& block = *running->block;
  size_t fixed = 0;
  for (const auto& array : block.arrays) {
    if (same(array->site, site)) return array->data;
    if (array->site.file != kDynamic) fixed += array->bytes;
  }
  if (site.file != kDynamic) {
    fixed += bytes;
    if (fixed > kMaxStaticBytes) fail("more than 48 KB of static shared memory", site);
  }
  if (fixed + cluster.launch.dynamic_shared_bytes > cluster.launch.max_shared_bytes)
    fail("more shared memory than the kernel may have", site);
  auto array = std::make_unique<SharedArray>();
  array->site = site;
  array->bytes = bytes;
  array->memory.resize(2 * kGuardBytes + bytes + 32);
  const auto start = reinterpret_cast<uintptr_t>(array->memory.data()) + kGuardBytes;
  array->data = reinterpret_cast<uint8_t*>((start + 15) / 16 * 16);
  fill(array->data - kGuardBytes, kGuardWord, kGuardBytes);
  fill(end_of(*array), kGuardWord, kGuardBytes);
  poison(array->data, bytes);
  block.arrays.push_back(std::move(array));
  return block.arrays.back()->data;
}

void* dynamic_shared() { return shared_array({kDynamic, 0}, cluster.launch.dynamic_shared_bytes); }

}  // namespace llmkern::emu
