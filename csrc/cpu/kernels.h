// The CPU kernels, declared once per instruction set: setup.py compiles every csrc/cpu/*.cpp with
// each set's flags and -DLLMKERN_ISA=<name>, and cpu_module.cpp picks a namespace at run time.
//
// Sources must keep everything else in an anonymous namespace and out of the standard library's
// templates: an inline function that two sets share is merged by the linker, and the copy that
// survives may hold instructions that this CPU lacks.
#pragma once

#include "llmkern.h"

#define LLMKERN_DECLARE_KERNELS(isa)                          \
  namespace llmkern::isa {                                    \
  void w4a16_gemm(const W4A16GemmParams& p);                  \
  void dequantize_int4(const DequantizeInt4Params& p);        \
  void lut4_gemm(const Lut4GemmParams& p);                    \
  void dequantize_lut4(const DequantizeLut4Params& p);        \
  void sparse24_gemm(const Sparse24GemmParams& p);            \
  void sparse24_w4a16_gemm(const Sparse24W4A16GemmParams& p); \
  void hessian_update(const HessianUpdateParams& p);          \
  bool hessian_factor(const HessianFactorParams& p);          \
  void obs_quantize(const ObsQuantizeParams& p);              \
  void obs_prune(const ObsPruneParams& p);                    \
  }

LLMKERN_DECLARE_KERNELS(portable)
LLMKERN_DECLARE_KERNELS(avx2)
LLMKERN_DECLARE_KERNELS(avx512)
LLMKERN_DECLARE_KERNELS(avx512bf16)
LLMKERN_DECLARE_KERNELS(zen4)
LLMKERN_DECLARE_KERNELS(amx)

#undef LLMKERN_DECLARE_KERNELS
