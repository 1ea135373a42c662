// One source, several instruction sets: the compiler emits a clone of a marked function for each
// level and the loader picks one for the processor it finds. Elsewhere: the portable path alone.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define BLIPFAST_CLONES 1
#define BLIPFAST_MULTI_ISA \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define BLIPFAST_CLONES 0
#define BLIPFAST_MULTI_ISA
#endif

// Such a clone must not call a function that was compiled for the lowest level.
#if defined(__GNUC__) || defined(__clang__)
#define BLIPFAST_INLINE inline __attribute__((always_inline))
#else
#define BLIPFAST_INLINE inline
#endif

namespace blipfast {

// Whether the processor and the system let this process use AMX on bfloat16 (asks for it once).
bool amx_bf16_ready();

// Whether the processor has AVX-512 with dot products of bfloat16.
bool avx512_bf16_ready();

inline int64_t isa_level() {
#if BLIPFAST_CLONES
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return 4;
  if (__builtin_cpu_supports("x86-64-v3")) return 3;
#endif
  return 0;
}

}  // namespace blipfast
