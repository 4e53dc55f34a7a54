// llmkern._cpu: the CPU kernels on raw pointers. Python has checked every argument.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

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
  void (*w4a16_gemm)(const W4A16GemmParams&);
  void (*dequantize_int4)(const DequantizeInt4Params&);
  void (*lut4_gemm)(const Lut4GemmParams&);
  void (*dequantize_lut4)(const DequantizeLut4Params&);
  void (*sparse24_gemm)(const Sparse24GemmParams&);
  void (*sparse24_w4a16_gemm)(const Sparse24W4A16GemmParams&);
  void (*hessian_update)(const HessianUpdateParams&);
  bool (*hessian_factor)(const HessianFactorParams&);
  void (*obs_quantize)(const ObsQuantizeParams&);
  void (*obs_prune)(const ObsPruneParams&);
};

#define LLMKERN_KERNELS(isa, supported) \
  {#isa,                                \
   supported,                           \
   isa::w4a16_gemm,                     \
   isa::dequantize_int4,                \
   isa::lut4_gemm,                      \
   isa::dequantize_lut4,                \
   isa::sparse24_gemm,                  \
   isa::sparse24_w4a16_gemm,            \
   isa::hessian_update,                 \
   isa::hessian_factor,                 \
   isa::obs_quantize,                   \
   isa::obs_prune}

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

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Int4Weight int4_weight(uintptr_t qweight, uintptr_t scales, uintptr_t zeros, int64_t N, int64_t K,
                       int64_t group_size, int scales_dtype, int layout) {
  return {pointer<void>(qweight), pointer<void>(scales), pointer<void>(zeros), N, K, group_size,
          DType(scales_dtype),    Int4Layout(layout)};
}

// `books` says what has a book of its own: 0 the tensor, 1 each row, 2 each group.
Lut4Weight lut4_weight(uintptr_t qweight, uintptr_t codebook, uintptr_t scales, int64_t N,
                       int64_t K, int64_t group_size, int books, int scales_dtype, int layout) {
  const int64_t groups = K / group_size;
  return {pointer<void>(qweight),
          pointer<float>(codebook),
          pointer<void>(scales),
          N,
          K,
          group_size,
          books == 2   ? groups * 16
          : books == 1 ? 16
                       : 0,
          books == 2 ? 16 : 0,
          DType(scales_dtype),
          Lut4Layout(layout)};
}

ObsQuantizeParams obs_loop(uintptr_t w, uintptr_t U, uintptr_t d, uintptr_t g_idx, uintptr_t codes,
                           uintptr_t scales, uintptr_t zeros, uintptr_t w_hat, uintptr_t loss,
                           uintptr_t mask, uintptr_t codebook, int64_t N, int64_t K,
                           int64_t group_size, int bits, bool dynamic, bool symmetric,
                           bool clip_search, int scales_dtype, int64_t book_row_stride,
                           int64_t book_group_stride) {
  return {pointer<float>(w),
          pointer<float>(U),
          pointer<float>(d),
          pointer<int32_t>(g_idx),
          pointer<uint8_t>(codes),
          pointer<float>(scales),
          pointer<float>(zeros),
          pointer<float>(w_hat),
          pointer<float>(loss),
          N,
          K,
          group_size,
          bits,
          dynamic,
          symmetric,
          clip_search,
          DType(scales_dtype),
          pointer<uint8_t>(mask),
          pointer<float>(codebook),
          book_row_stride,
          book_group_stride};
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("isa", [] { return active->isa; }, "Instruction set in use.");
  m.def("isas", isas, "Instruction sets this CPU and build have, best first.");
  m.def("set_isa", set_isa, "Use another of isas(); for tests and benchmarks.");
  m.def(
      "w4a16_gemm",
      [](uintptr_t x, uintptr_t qweight, uintptr_t scales, uintptr_t zeros, uintptr_t bias,
         uintptr_t out, int64_t M, int64_t N, int64_t K, int64_t x_stride, int64_t group_size,
         int dtype, int scales_dtype, int layout, bool int8_activation) {
        active->w4a16_gemm(
            {pointer<void>(x),
             int4_weight(qweight, scales, zeros, N, K, group_size, scales_dtype, layout),
             pointer<void>(bias), pointer<void>(out), M, x_stride, DType(dtype), int8_activation});
      },
      unlocked);
  m.def(
      "dequantize_int4",
      [](uintptr_t qweight, uintptr_t scales, uintptr_t zeros, uintptr_t out, int64_t N, int64_t K,
         int64_t group_size, int dtype, int scales_dtype, int layout) {
        active->dequantize_int4(
            {int4_weight(qweight, scales, zeros, N, K, group_size, scales_dtype, layout),
             pointer<void>(out), DType(dtype)});
      },
      unlocked);
  m.def(
      "lut4_gemm",
      [](uintptr_t x, uintptr_t qweight, uintptr_t codebook, uintptr_t scales, uintptr_t bias,
         uintptr_t out, int64_t M, int64_t N, int64_t K, int64_t x_stride, int64_t group_size,
         int books, int dtype, int scales_dtype, int layout) {
        active->lut4_gemm(
            {pointer<void>(x),
             lut4_weight(qweight, codebook, scales, N, K, group_size, books, scales_dtype, layout),
             pointer<void>(bias), pointer<void>(out), M, x_stride, DType(dtype)});
      },
      unlocked);
  m.def(
      "dequantize_lut4",
      [](uintptr_t qweight, uintptr_t codebook, uintptr_t scales, uintptr_t out, int64_t N,
         int64_t K, int64_t group_size, int books, int dtype, int scales_dtype, int layout) {
        active->dequantize_lut4(
            {lut4_weight(qweight, codebook, scales, N, K, group_size, books, scales_dtype, layout),
             pointer<void>(out), DType(dtype)});
      },
      unlocked);
  m.def(
      "sparse24_gemm",
      [](uintptr_t x, uintptr_t values, uintptr_t meta, uintptr_t bias, uintptr_t out, int64_t M,
         int64_t N, int64_t K, int64_t x_stride, int dtype, int layout) {
        active->sparse24_gemm({pointer<void>(x), pointer<void>(values), pointer<void>(meta),
                               pointer<void>(bias), pointer<void>(out), M, N, K, x_stride,
                               DType(dtype), Sparse24Layout(layout)});
      },
      unlocked);
  m.def(
      "sparse24_w4a16_gemm",
      [](uintptr_t x, uintptr_t qvalues, uintptr_t meta, uintptr_t scales, uintptr_t zeros,
         uintptr_t bias, uintptr_t out, int64_t M, int64_t N, int64_t K, int64_t x_stride,
         int64_t group_size, int dtype, int scales_dtype, int layout) {
        active->sparse24_w4a16_gemm(
            {pointer<void>(x), pointer<void>(qvalues), pointer<void>(meta), pointer<void>(scales),
             pointer<void>(zeros), pointer<void>(bias), pointer<void>(out), M, N, K, x_stride,
             group_size, DType(dtype), DType(scales_dtype), Sparse24Layout(layout)});
      },
      unlocked);
  m.def(
      "hessian_update",
      [](uintptr_t H, uintptr_t x, int64_t T, int64_t K, double alpha, int dtype) {
        active->hessian_update({pointer<float>(H), pointer<void>(x), T, K, alpha, DType(dtype)});
      },
      unlocked);
  m.def(
      "hessian_factor",
      [](uintptr_t H, uintptr_t diagonal, uintptr_t order, uintptr_t U, uintptr_t d, int64_t K) {
        return active->hessian_factor({pointer<float>(H), pointer<float>(diagonal),
                                       pointer<int64_t>(order), pointer<float>(U),
                                       pointer<float>(d), K});
      },
      "False if H is not positive definite.", unlocked);
  py::class_<ObsQuantizeParams>(m, "ObsLoop", "A weight, its factor and what it is rounded to.")
      .def(py::init(&obs_loop));
  m.def(
      "obs_quantize", [](const ObsQuantizeParams& loop) { active->obs_quantize(loop); }, unlocked);
  m.def(
      "obs_prune",
      [](const ObsQuantizeParams& loop, uintptr_t chosen, double sparsity, int64_t kept,
         int64_t size, bool per_row) {
        active->obs_prune({loop, pointer<uint8_t>(chosen), sparsity, per_row, kept, size});
      },
      unlocked);
}
