// Uninitialised memory for one call, aligned to a cache line.
#pragma once

#include <cstdint>
#include <new>

namespace llmkern::LLMKERN_ISA {
namespace {

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(operator new(count * sizeof(T), std::align_val_t(64)))) {}
  ~Buffer() { operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return data_; }

 private:
  T* data_;
};

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
