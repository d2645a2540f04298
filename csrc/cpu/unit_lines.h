// Lines of pixels: what the convolutions of the unit law add.

#pragma once

#include <algorithm>

#include "cpu/product.h"

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

constexpr int kMostUses = 64;  // lines that are added together

inline int64_t vectors(int64_t floats) { return (floats + kVector - 1) / kVector * kVector; }

// Floats between planes of so many pixels: room for a vector, or for 8 floats, behind them, and
// planes that begin in different sets of a cache.
inline int64_t plane_of(int64_t pixels) {
  const int64_t plane = (pixels + std::max(kVector, 8) + 15) / 16 * 16;
  return plane / 16 % 2 ? plane : plane + 16;
}

// y [floats] (+)= Σ ± line [floats]: whole vectors, four at a time.
inline void add_to_line(const float* const* line, const float* sign, int uses, int64_t floats,
                        bool add, float* y) {
  typedef Floats<kVector> Vector;
  constexpr int kStep = 4;
  int64_t i = 0;
  for (; i + kStep * kVector <= floats; i += kStep * kVector) {
    Vector sum[kStep];
#pragma GCC unroll 4
    for (int v = 0; v < kStep; ++v) sum[v] = add ? load<kVector>(y + i + v * kVector) : Vector{};
    for (int u = 0; u < uses; ++u) {
      const Vector factor = splat<kVector>(sign[u]);
#pragma GCC unroll 4
      for (int v = 0; v < kStep; ++v) sum[v] += factor * load<kVector>(line[u] + i + v * kVector);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kStep; ++v) store<kVector>(y + i + v * kVector, sum[v]);
  }
  for (; i < floats; i += kVector) {
    Vector sum = add ? load<kVector>(y + i) : Vector{};
    for (int u = 0; u < uses; ++u) {
      sum += splat<kVector>(sign[u]) * load<kVector>(line[u] + i);
    }
    store<kVector>(y + i, sum);
  }
}

}  // namespace
}  // namespace rpg
