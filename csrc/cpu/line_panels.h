// Lines of pixels cut into panels: the columns that a product takes at once, line after line, so
// that what is multiplied together lies together. Whole lines are in as many pages, more than the
// first translation buffer holds, and would be read again for every 6 or 8 slots of every unit.

#pragma once

#include <algorithm>

#include "cpu/product.h"

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

// Steps of a product with so many channels: words of pairs have two each.
inline int steps_of(int channels, const float*) { return channels; }
inline int steps_of(int channels, const uint32_t*) { return (channels + 1) / 2; }

// panel [channels, width] of lines of x, `x_plane` apart.
inline void fill_panel(const float* x, int64_t x_plane, int channels, int width, float* panel) {
  for (int k = 0; k < channels; ++k) {
    for (int i = 0; i < width; i += kVector) {
      store<kVector>(panel + k * width + i, load<kVector>(x + k * x_plane + i));
    }
  }
}

// The same in words of pairs, [ceil(channels / 2), width].
inline void fill_panel(const float* x, int64_t x_plane, int channels, int width, uint32_t* panel) {
  for (int k = 0; k < channels; k += 2) {
    for (int i = 0; i < width; i += kVector, panel += kVector) {
      const float* even = x + k * x_plane + i;
      const Floats<kVector> odd =
          k + 1 < channels ? load<kVector>(even + x_plane) : Floats<kVector>{};
      const Pairs<kVector> words = join<kVector>(load<kVector>(even), odd);
      std::memcpy(panel, &words, sizeof words);
    }
  }
}

// Panels, `panel` columns wide, of lines of x [channels, columns], `x_plane` apart; columns are
// whole vectors. Lines of words stay what they are.
template <class Element>
inline void fill_panels(const float* x, int64_t x_plane, int channels, int64_t columns, int panel,
                        Element* panels) {
  for (int64_t j = 0; j < columns; j += panel) {
    const int width = static_cast<int>(std::min<int64_t>(columns - j, panel));
    fill_panel(x + j, x_plane, channels, width, panels);
    panels += steps_of(channels, panels) * width;
  }
}

// s [slots, columns] = window [slots, channels] · panels of lines [channels, columns], with lines
// of s `s_plane` apart. Returns where the next panels begin.
template <class Element>
inline const Element* multiply_lines(int slots, int64_t columns, const FactorOf<Element>& window,
                                     const Element* panels, int panel, int channels, float* s,
                                     int64_t s_plane) {
  const int steps = steps_of(channels, panels);
  for (int64_t j = 0; j < columns; j += panel) {
    const int width = static_cast<int>(std::min<int64_t>(columns - j, panel));
    multiply<false>(slots, width, window, panels, width, steps, s + j, s_plane);
    panels += steps * width;
  }
  return panels;
}

}  // namespace
}  // namespace rpg
