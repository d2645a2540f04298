// Lines of pixels: what the convolutions of the unit law multiply and add.

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

// panel [channels, width] of lines of x, `x_plane` apart; returns the steps of a product with it.
inline int fill_panel(const float* x, int64_t x_plane, int channels, int width, float* panel) {
  for (int k = 0; k < channels; ++k) {
    for (int i = 0; i < width; i += kVector) {
      store<kVector>(panel + k * width + i, load<kVector>(x + k * x_plane + i));
    }
  }
  return channels;
}

// The same in words of pairs, [ceil(channels / 2), width].
inline int fill_panel(const float* x, int64_t x_plane, int channels, int width, uint32_t* panel) {
  for (int k = 0; k < channels; k += 2) {
    for (int i = 0; i < width; i += kVector, panel += kVector) {
      const float* even = x + k * x_plane + i;
      const Floats<kVector> odd =
          k + 1 < channels ? load<kVector>(even + x_plane) : Floats<kVector>{};
      const Pairs<kVector> words = join<kVector>(load<kVector>(even), odd);
      std::memcpy(panel, &words, sizeof words);
    }
  }
  return (channels + 1) / 2;
}

// s [slots, columns] = window [slots, channels] · x [channels, columns] with lines of `x_plane` and
// `s_plane`; columns are whole vectors. A panel of x is copied first: its lines are in as many
// pages, more than the first translation buffer holds, and are read again for every 6 slots.
template <class Element>
inline void multiply_lines(int slots, int64_t columns, const FactorOf<Element>& window,
                           const float* x, int64_t x_plane, int channels, float* s, int64_t s_plane,
                           Element* panel) {
  for (int64_t j = 0; j < columns; j += kPanel) {
    const int width = static_cast<int>(std::min<int64_t>(columns - j, kPanel));
    const int steps = fill_panel(x + j, x_plane, channels, width, panel);
    multiply<false>(slots, width, window, panel, width, steps, s + j, s_plane);
  }
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
