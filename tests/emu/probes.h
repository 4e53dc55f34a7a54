// What the probe kernels share: their parameters, and how the tests run them by name.
#pragma once

#include <stdint.h>

// `mode` picks what is broken, 0 being nothing.
struct Probe {
  const void *a, *b, *c;
  void* out;
  int mode;
};

#ifdef LLMKERN_EMU
#include <stdexcept>
#include <string>

#include "cuda/common/launch.h"
#include "emu/emulator.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// f()'s error, or "".
template <typename F>
const char* error_of(F&& f) {
  static std::string error;
  error.clear();
  try {
    f();
  } catch (const std::runtime_error& caught) {
    error = caught.what();
  }
  return error.c_str();
}

struct ProbeKernel {
  const char* name;
  void (*kernel)(Probe);
  int ctas, threads;
  llmkern::cuda::LaunchOptions options;
};

template <size_t COUNT>
const char* run_probe(const ProbeKernel (&kernels)[COUNT], const char* name, const Probe& probe,
                      bool reverse) {
  return error_of([&] {
    using namespace llmkern;
    emu::set_order(reverse ? emu::Order::kReverse : emu::Order::kForward);
    for (const ProbeKernel& k : kernels)
      if (name == std::string(k.name))
        return cuda::launch_with(k.options, name, k.kernel, k.ctas, k.threads, nullptr, probe);
    throw std::runtime_error("no such probe");
  });
}
#endif
