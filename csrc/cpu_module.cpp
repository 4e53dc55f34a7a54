// llmkern._cpu: the CPU kernels on raw pointers. Python has checked every argument.

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "cpu/kernels.h"

#ifdef __x86_64__
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace py = pybind11;
using namespace llmkern;

namespace {

struct Kernels {
  const char* isa;
  bool (*supported)();
#define LLMKERN_MEMBER(isa, result, op, Params) result (*op)(const Params&);
  LLMKERN_CPU_KERNELS(LLMKERN_MEMBER, )
};

#define LLMKERN_ADDRESS(isa, result, op, Params) , isa::op
#define LLMKERN_KERNELS(isa, supported) {#isa, supported LLMKERN_CPU_KERNELS(LLMKERN_ADDRESS, isa)}

// A build may leave out sets: setup.py defines LLMKERN_HAS_<SET> for those that it compiles.
#ifdef __x86_64__
[[maybe_unused]] bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

[[maybe_unused]] bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

[[maybe_unused]] bool has_avx512bf16() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

// AMD's have full-rate bfloat16 dot products: 1 per cycle on Zen 4, where an Intel Xeon (Sapphire
// Rapids) without AMX ran them at an eighth of the rate of its byte dot products.
[[maybe_unused]] bool has_fast_bf16() { return has_avx512bf16() && __builtin_cpu_is("amd"); }

// Tiles exist, and the system lets this process use them: Linux wants to be asked first.
[[maybe_unused]] bool has_amx() {
#ifdef __linux__
  unsigned a, b, c, d;
  constexpr unsigned kBF16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  constexpr unsigned kAll = kBF16 | kTile | kInt8;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return has_avx512bf16() && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// Best first.
const Kernels kKernels[] = {
#ifdef LLMKERN_HAS_AMX
    LLMKERN_KERNELS(amx, has_amx),
#endif
#ifdef LLMKERN_HAS_ZEN4
    LLMKERN_KERNELS(zen4, has_fast_bf16),
#endif
#ifdef LLMKERN_HAS_AVX512BF16
    LLMKERN_KERNELS(avx512bf16, has_avx512bf16),
#endif
#ifdef LLMKERN_HAS_AVX512
    LLMKERN_KERNELS(avx512, has_avx512),
#endif
#ifdef LLMKERN_HAS_AVX2
    LLMKERN_KERNELS(avx2, has_avx2),
#endif
    LLMKERN_KERNELS(portable, [] { return true; }),
};

const Kernels* best() {
  for (const Kernels& k : kKernels)
    if (k.supported()) return &k;
  return nullptr;  // unreachable: portable is always supported
}

const Kernels* active = best();

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels& k : kKernels)
    if (k.supported()) names.emplace_back(k.isa);
  return names;
}

void set_isa(const std::string& name) {
  for (const Kernels& k : kKernels) {
    if (name == k.isa && k.supported()) {
      active = &k;
      return;
    }
  }
  throw std::invalid_argument("isa: got " + name + ", which this CPU or build does not have");
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.def("isa", [] { return active->isa; }, "Instruction set in use.");
  m.def("isas", isas, "Instruction sets this CPU and build have, best first.");
  m.def("set_isa", set_isa, "Use another of isas(); for tests and benchmarks.");
  bindings::export_enums(m);
#define LLMKERN_DEF(isa, result, op, Params) \
  bindings::def(m, #op, +[](const Params& p) { return active->op(p); });
  LLMKERN_CPU_KERNELS(LLMKERN_DEF, )
}
