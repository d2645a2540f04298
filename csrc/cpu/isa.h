// What the machine has of the instruction sets that kernels are compiled for.

#pragma once

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
#endif

}  // namespace rpg
