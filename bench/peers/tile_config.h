// Included before ggml's sources. GCC 12's _tile_loadconfig tells the optimizer that 8 of the 64
// bytes of the configuration are read, so that it may drop the stores of the rest, and ldtilecfg
// faults.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define _tile_loadconfig(config) \
  __asm__ volatile("ldtilecfg %0" ::"m"(*(const char (*)[64])(config)))
#endif
