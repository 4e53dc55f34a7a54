// The CPU kernels, declared once per instruction set: setup.py compiles every csrc/cpu/*.cpp with
// each set's flags and -DLLMKERN_ISA=<name>, and cpu_module.cpp picks a namespace at run time.
//
// Sources must keep everything else in an anonymous namespace and out of the standard library's
// templates: an inline function that two sets share is merged by the linker, and the copy that
// survives may hold instructions that this CPU lacks.
#pragma once

#include "llmkern.h"

// All of them, as kernel(isa, result, op, Params); hessian_factor says whether H is positive
// definite.
// clang-format off
#define LLMKERN_CPU_KERNELS(kernel, isa)                          \
  kernel(isa, void, w4a16_gemm, W4A16GemmParams)                  \
  kernel(isa, void, dequantize_int4, DequantizeInt4Params)        \
  kernel(isa, void, lut4_gemm, Lut4GemmParams)                    \
  kernel(isa, void, dequantize_lut4, DequantizeLut4Params)        \
  kernel(isa, void, sparse24_gemm, Sparse24GemmParams)            \
  kernel(isa, void, sparse24_w4a16_gemm, Sparse24W4A16GemmParams) \
  kernel(isa, void, hessian_update, HessianUpdateParams)          \
  kernel(isa, bool, hessian_factor, HessianFactorParams)          \
  kernel(isa, void, obs_quantize, ObsQuantizeParams)              \
  kernel(isa, void, obs_prune, ObsPruneParams)
// clang-format on

#define LLMKERN_DECLARE(isa, result, op, Params) \
  namespace llmkern::isa {                       \
  result op(const Params& p);                    \
  }

LLMKERN_CPU_KERNELS(LLMKERN_DECLARE, portable)
LLMKERN_CPU_KERNELS(LLMKERN_DECLARE, avx2)
LLMKERN_CPU_KERNELS(LLMKERN_DECLARE, avx512)
LLMKERN_CPU_KERNELS(LLMKERN_DECLARE, avx512bf16)
LLMKERN_CPU_KERNELS(LLMKERN_DECLARE, zen4)
LLMKERN_CPU_KERNELS(LLMKERN_DECLARE, amx)

#undef LLMKERN_DECLARE
