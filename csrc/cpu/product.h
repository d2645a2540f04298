// C [MR, NV V] (+)= A [MR, k] · B [k, NV V]: the product that the kernels of lanes are made of, V
// being the lanes of a vector.
//
// Sums stay in registers: MR NV of them beside NV vectors of B and an element of A for each row,
// 6 x 2 + 3 of 16 with AVX2, 6 x 4 + 5 of 32 with AVX-512. Each step of k loads NV vectors of B and
// MR elements of A for MR NV multiply-adds. All fp32; steps of k are added in order.

#pragma once

#include "cpu/simd.h"

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

#if defined(__AVX512F__)
constexpr int kVector = 16, kProductVectors = 4;
#elif defined(__AVX2__)
constexpr int kVector = 8, kProductVectors = 2;
#else
constexpr int kVector = 4, kProductVectors = 2;
#endif
constexpr int kPanel = kVector * kProductVectors;  // columns of C that are multiplied at once

// Where operands of a product lie: element (r, k) of A at a + r a_row + k a_step, and so on.
struct Factor {
  const float* data;
  int64_t row;
  int64_t step;
};

template <int MR, int NV, bool ADD>
inline void multiply_rows(const Factor& a, const float* b, int64_t b_step, int steps, float* c,
                          int64_t c_row) {
  typedef Floats<kVector> Vector;
  Vector sum[MR][NV];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[r][v] = Vector{};
  }
  const float* ak = a.data;
  for (int k = 0; k < steps; ++k, ak += a.step, b += b_step) {
    Vector bk[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) bk[v] = load<kVector>(b + v * kVector);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const Vector element = splat<kVector>(ak[r * a.row]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[r][v] += element * bk[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* target = c + r * c_row + v * kVector;
      store<kVector>(target, ADD ? load<kVector>(target) + sum[r][v] : sum[r][v]);
    }
  }
}

// The same of any number of rows. `soon` is memory that is read after this product: a line of it is
// asked for with each row.
template <int NV, bool ADD>
inline void multiply_panel(int rows, Factor a, const float* b, int64_t b_step, int steps, float* c,
                           int64_t c_row, const char*& soon) {
  constexpr int kRows = NV == 1 ? 8 : 6;
  for (; rows >= kRows; rows -= kRows, a.data += kRows * a.row, c += kRows * c_row) {
    if (soon) {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) __builtin_prefetch(soon + 64 * i, 0, 2);
      soon += 64 * kRows;
    }
    multiply_rows<kRows, NV, ADD>(a, b, b_step, steps, c, c_row);
  }
  if (rows >= 4) {
    multiply_rows<4, NV, ADD>(a, b, b_step, steps, c, c_row);
    rows -= 4, a.data += 4 * a.row, c += 4 * c_row;
  }
  if (rows >= 2) {
    multiply_rows<2, NV, ADD>(a, b, b_step, steps, c, c_row);
    rows -= 2, a.data += 2 * a.row, c += 2 * c_row;
  }
  if (rows) multiply_rows<1, NV, ADD>(a, b, b_step, steps, c, c_row);
}

// C [rows, columns] (+)= A [rows, steps] · B [steps, columns]; columns a multiple of V. Panels of B
// one after the other, each with all rows.
template <bool ADD>
inline void multiply(int rows, int columns, const Factor& a, const float* b, int64_t b_step,
                     int steps, float* c, int64_t c_row, const void* next = nullptr) {
  const char* soon = static_cast<const char*>(next);
  int j = 0;
  for (; j + kPanel <= columns; j += kPanel) {
    multiply_panel<kProductVectors, ADD>(rows, a, b + j, b_step, steps, c + j, c_row, soon);
  }
  if (kProductVectors > 2 && columns - j >= 2 * kVector) {
    multiply_panel<2, ADD>(rows, a, b + j, b_step, steps, c + j, c_row, soon);
    j += 2 * kVector;
  }
  if (j < columns) multiply_panel<1, ADD>(rows, a, b + j, b_step, steps, c + j, c_row, soon);
}

}  // namespace
}  // namespace rpg
