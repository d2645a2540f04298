// Vectors of floats as the compiler's own extension (GCC and Clang), so that one source serves
// every instruction set: a vector wider than the machine's registers becomes several of them.

#pragma once

#include <cstdint>
#include <cstring>

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

template <int LANES>
struct FloatsOf {
  typedef float floats __attribute__((vector_size(4 * LANES)));
  typedef int32_t integers __attribute__((vector_size(4 * LANES)));
};
template <int LANES>
using Floats = typename FloatsOf<LANES>::floats;

// Rows of a product that are summed at once, so that their sums stay in registers.
#if defined(__AVX512F__)
constexpr int kProductRows = 8;
#else
constexpr int kProductRows = 4;
#endif

template <int LANES>
inline Floats<LANES> load(const float* values) {
  Floats<LANES> x;
  std::memcpy(&x, values, sizeof x);
  return x;
}

template <int LANES>
inline void store(float* values, const Floats<LANES>& x) {
  std::memcpy(values, &x, sizeof x);
}

template <int LANES>
inline Floats<LANES> splat(float x) {
  return x - Floats<LANES>{};  // 0 is exact: x - 0 == x, also for -0
}

// x with its sign bit flipped where `mask` has one: mask is 0 or 0x80000000.
template <int LANES>
inline Floats<LANES> flip_all(const Floats<LANES>& x, uint32_t mask) {
  typename FloatsOf<LANES>::integers integers;
  std::memcpy(&integers, &x, sizeof integers);
  integers ^= static_cast<int32_t>(mask);
  Floats<LANES> y;
  std::memcpy(&y, &integers, sizeof y);
  return y;
}

#if defined(__clang__)
#define RPG_SHUFFLE16(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define RPG_SHUFFLE16(a, b, ...) \
  __builtin_shuffle(a, b, typename FloatsOf<16>::integers{__VA_ARGS__})
#endif

// Lane i of the result is the sum of all lanes of x[i].
inline Floats<16> sum_rows(Floats<16> (&x)[16]) {
  // Each fold halves the vectors: one holds the partial sums of twice as many rows.
#define RPG_FOLD(COUNT, LOW, HIGH)                               \
  for (int i = 0; i < COUNT; ++i) {                              \
    const Floats<16> a = x[i], b = x[i + COUNT];                 \
    x[i] = RPG_SHUFFLE16(a, b, LOW) + RPG_SHUFFLE16(a, b, HIGH); \
  }
#define RPG_LOW8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define RPG_HIGH8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define RPG_LOW4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define RPG_HIGH4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define RPG_LOW2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define RPG_HIGH2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define RPG_LOW1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define RPG_HIGH1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
  RPG_FOLD(8, RPG_LOW8, RPG_HIGH8)
  RPG_FOLD(4, RPG_LOW4, RPG_HIGH4)
  RPG_FOLD(2, RPG_LOW2, RPG_HIGH2)
  RPG_FOLD(1, RPG_LOW1, RPG_HIGH1)
  return x[0];
}

}  // namespace
}  // namespace rpg
