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

// N vectors of y (+)= Σ ± line: those that begin at `target` of y and at `source` of lines.
template <int N>
inline void add_vectors(const float* const* line, const int64_t* source, const float* sign,
                        int uses, bool add, float* y, const int64_t* target) {
  typedef Floats<kVector> Vector;
  Vector sum[N];
  int64_t from_line[N];
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) {
    from_line[v] = source[v];
    sum[v] = add ? load<kVector>(y + target[v]) : Vector{};
  }
  for (int u = 0; u < uses; ++u) {
    const Vector factor = splat<kVector>(sign[u]);
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) sum[v] += factor * load<kVector>(line[u] + from_line[v]);
  }
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) store<kVector>(y + target[v], sum[v]);
}

// y [rows, floats] (+)= Σ ± line [rows, floats], with rows `y_step` and `step` apart: whole
// vectors, four at a time, since one sum waits for itself; of short rows they are those of several.
// Where rows do not fill vectors there is only one.
inline void add_rows(const float* const* line, const float* sign, int uses, int64_t rows,
                     int64_t floats, int64_t step, int64_t y_step, bool add, float* y) {
  int64_t source[4], target[4];
  int count = 0;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < floats; j += kVector) {
      source[count] = i * step + j, target[count] = i * y_step + j;
      if (++count < 4) continue;
      add_vectors<4>(line, source, sign, uses, add, y, target);
      count = 0;
    }
  }
  if (count == 3) add_vectors<3>(line, source, sign, uses, add, y, target);
  if (count == 2) add_vectors<2>(line, source, sign, uses, add, y, target);
  if (count == 1) add_vectors<1>(line, source, sign, uses, add, y, target);
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
