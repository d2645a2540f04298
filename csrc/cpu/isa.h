// What the machine has of the instruction sets that kernels are compiled for.

#pragma once

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rpg {

#if defined(__x86_64__)
inline bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2");
}

inline bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512cd");
}

// Products of pairs of bfloat16; older compilers do not know the name.
inline bool has_avx512_bf16() {
#if __GNUC__ >= 11 || __clang_major__ >= 12
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// Dot products of 4 bytes, where a compiler's assembler knows those of pairs.
inline bool has_avx512_vnni() {
#if __GNUC__ >= 11 || __clang_major__ >= 12
  return has_avx512() && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

// Products of tiles of int8. Linux gives a process tiles when it asks for them, and refuses where
// it knows none.
inline bool has_amx_int8() {
#if defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
  constexpr long kRequestState = 0x1023, kTileData = 18;
  return has_avx512_vnni() && __builtin_cpu_supports("amx-tile") &&
         __builtin_cpu_supports("amx-int8") &&
         syscall(SYS_arch_prctl, kRequestState, kTileData) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace rpg
