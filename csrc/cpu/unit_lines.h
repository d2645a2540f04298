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

// N vectors of y (+)= Σ ± line.
template <int N>
inline void add_vectors(const float* const* line, int64_t offset, const float* sign, int uses,
                        bool add, float* y) {
  typedef Floats<kVector> Vector;
  Vector sum[N];
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) sum[v] = add ? load<kVector>(y + v * kVector) : Vector{};
  for (int u = 0; u < uses; ++u) {
    const Vector factor = splat<kVector>(sign[u]);
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) sum[v] += factor * load<kVector>(line[u] + offset + v * kVector);
  }
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) store<kVector>(y + v * kVector, sum[v]);
}

// y [floats] (+)= Σ ± line [floats], of lines from `offset` on: whole vectors, four at a time.
inline void add_to_line(const float* const* line, int64_t offset, const float* sign, int uses,
                        int64_t floats, bool add, float* y) {
  const int64_t end = vectors(floats);
  int64_t i = 0;
  for (; i + 4 * kVector <= end; i += 4 * kVector) {
    add_vectors<4>(line, offset + i, sign, uses, add, y + i);
  }
  const int64_t rest = (end - i) / kVector;
  if (rest == 3) add_vectors<3>(line, offset + i, sign, uses, add, y + i);
  if (rest == 2) add_vectors<2>(line, offset + i, sign, uses, add, y + i);
  if (rest == 1) add_vectors<1>(line, offset + i, sign, uses, add, y + i);
}

// Lines of rows of `width` floats without gaps, as lines of rows `row` floats apart: of `source`
// and `out` [lines, rows], both with lines `plane` apart. What follows a row within its last vector
// becomes zero: a gap, the row that is copied next, or what lies behind the last.
inline void copy_lines(const float* source, int64_t lines, int64_t plane, int64_t rows,
                       int64_t width, int64_t row, float* out) {
  typedef typename FloatsOf<kVector>::integers Mask;
  const int64_t whole = width / kVector * kVector;
  Mask rest;
  for (int l = 0; l < kVector; ++l) rest[l] = l < width - whole ? -1 : 0;
  for (int64_t line = 0; line < lines; ++line, source += plane, out += plane) {
    for (int64_t i = 0; i < rows; ++i) {
      const float* packed = source + i * width;
      float* line_of_row = out + i * row;
      for (int64_t j = 0; j < whole; j += kVector)
        store<kVector>(line_of_row + j, load<kVector>(packed + j));
      if (whole == width) continue;
      Mask last;
      std::memcpy(&last, packed + whole, sizeof last);
      last &= rest;
      std::memcpy(line_of_row + whole, &last, sizeof last);
    }
  }
}

}  // namespace
}  // namespace rpg
