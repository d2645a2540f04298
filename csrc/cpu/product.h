// C [MR, NV V] (+)= A [MR, k] · B [k, NV V]: the product that the kernels of lanes are made of, V
// being the lanes of a vector.
//
// Sums stay in registers: MR NV of them beside NV vectors of B and an element of A for each row,
// 6 x 2 + 3 of 16 with AVX2, 6 x 4 + 5 or 12 x 2 + 3 of 32 with AVX-512. Each step of k loads NV
// vectors of B and MR elements of A for MR NV multiply-adds. Steps of k are added in order, in
// fp32.
//
// Operands are fp32, or words of pairs (pairs.h), of which a step is two steps of bfloat16.

#pragma once

#include "cpu/pairs.h"

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
template <class Element>
struct FactorOf {
  const Element* data;
  int64_t row;
  int64_t step;
};
using Factor = FactorOf<float>;
using PairFactor = FactorOf<uint32_t>;

// What a step of a product loads of either operand, and how it is added to a sum.
inline Floats<kVector> load_line(const float* b) { return load<kVector>(b); }
inline Pairs<kVector> load_line(const uint32_t* b) { return load_words<kVector>(b); }
inline Floats<kVector> splat_of(const float* a) { return splat<kVector>(*a); }
inline Pairs<kVector> splat_of(const uint32_t* a) {
  int32_t word;  // copied, since some write words as two halves
  std::memcpy(&word, a, sizeof word);
  return word - Pairs<kVector>{};
}

template <bool DOT>
inline void add_step(Floats<kVector>& sum, const Floats<kVector>& a, const Floats<kVector>& b) {
  sum += a * b;
}

template <bool DOT>
inline void add_step(Floats<kVector>& sum, const Pairs<kVector>& a, const Pairs<kVector>& b) {
  add_pairs<kVector, DOT>(sum, a, b);
}

template <int MR, int NV, bool ADD, bool DOT, class Element>
inline void multiply_rows(const FactorOf<Element>& a, const Element* b, int64_t b_step, int steps,
                          float* c, int64_t c_row) {
  typedef Floats<kVector> Vector;
  typedef decltype(load_line(b)) Line;
  Vector sum[MR][NV];
#pragma GCC unroll 12
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[r][v] = Vector{};
  }
  const Element* ak = a.data;
  for (int k = 0; k < steps; ++k, ak += a.step, b += b_step) {
    Line bk[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) bk[v] = load_line(b + v * kVector);
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r) {
      const Line element = splat_of(ak + r * a.row);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) add_step<DOT>(sum[r][v], element, bk[v]);
    }
  }
#pragma GCC unroll 12
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
template <int NV, bool ADD, bool DOT, class Element>
inline void multiply_panel(int rows, FactorOf<Element> a, const Element* b, int64_t b_step,
                           int steps, float* c, int64_t c_row, const char*& soon) {
  constexpr int kRows = NV == 1 ? 8 : kProductVectors > 2 && NV == 2 ? 12 : 6;
  for (; rows >= kRows; rows -= kRows, a.data += kRows * a.row, c += kRows * c_row) {
    if (soon) {
#pragma GCC unroll 12
      for (int i = 0; i < kRows; ++i) __builtin_prefetch(soon + 64 * i, 0, 2);
      soon += 64 * kRows;
    }
    multiply_rows<kRows, NV, ADD, DOT>(a, b, b_step, steps, c, c_row);
  }
  if (kRows > 8 && rows >= 8) {
    multiply_rows<8, NV, ADD, DOT>(a, b, b_step, steps, c, c_row);
    rows -= 8, a.data += 8 * a.row, c += 8 * c_row;
  }
  if (rows >= 4) {
    multiply_rows<4, NV, ADD, DOT>(a, b, b_step, steps, c, c_row);
    rows -= 4, a.data += 4 * a.row, c += 4 * c_row;
  }
  if (rows >= 2) {
    multiply_rows<2, NV, ADD, DOT>(a, b, b_step, steps, c, c_row);
    rows -= 2, a.data += 2 * a.row, c += 2 * c_row;
  }
  if (rows) multiply_rows<1, NV, ADD, DOT>(a, b, b_step, steps, c, c_row);
}

// Panels of B one after the other, each with all rows.
template <bool ADD, bool DOT, class Element>
inline void multiply_panels(int rows, int columns, const FactorOf<Element>& a, const Element* b,
                            int64_t b_step, int steps, float* c, int64_t c_row, const void* next) {
  const char* soon = static_cast<const char*>(next);
  int j = 0;
  for (; j + kPanel <= columns; j += kPanel) {
    multiply_panel<kProductVectors, ADD, DOT>(rows, a, b + j, b_step, steps, c + j, c_row, soon);
  }
  if (kProductVectors > 2 && columns - j >= 2 * kVector) {
    multiply_panel<2, ADD, DOT>(rows, a, b + j, b_step, steps, c + j, c_row, soon);
    j += 2 * kVector;
  }
  if (j < columns) multiply_panel<1, ADD, DOT>(rows, a, b + j, b_step, steps, c + j, c_row, soon);
}

// C [rows, columns] (+)= A [rows, steps] · B [steps, columns]; columns a multiple of V.
template <bool ADD>
inline void multiply(int rows, int columns, const Factor& a, const float* b, int64_t b_step,
                     int steps, float* c, int64_t c_row, const void* next = nullptr) {
  multiply_panels<ADD, false>(rows, columns, a, b, b_step, steps, c, c_row, next);
}

// The same of words of pairs: a step is two of bfloat16.
template <bool ADD>
inline void multiply(int rows, int columns, const PairFactor& a, const uint32_t* b, int64_t b_step,
                     int steps, float* c, int64_t c_row, const void* next = nullptr) {
  if (has_dot_products()) {
    return multiply_panels<ADD, kDotProducts>(rows, columns, a, b, b_step, steps, c, c_row, next);
  }
  multiply_panels<ADD, false>(rows, columns, a, b, b_step, steps, c, c_row, next);
}

}  // namespace
}  // namespace rpg
