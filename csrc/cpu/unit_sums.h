// What makes y of products by slot, S, for kernels of the unit law: each row of a unit adds the
// line of S that it reads, with its sign.

#pragma once

#include "cpu/unit_window.h"

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

// Row n of a unit is number n of those that are added.
struct EveryRow {
  int64_t operator()(int64_t n) const { return n; }
};

// y [rows, L] (+)= ± S[slot] of `count` columns, where L is NV vectors. Row n of y is what row
// row_of(n) of the unit adds up.
template <int NV, class RowOf>
void add_lines(const OctetEntry* const* entry, const float* const* s, int count, int64_t rows,
               const RowOf& row_of, const int32_t (*residues)[8], bool add, float* y) {
  typedef Floats<kVector> Vector;
  constexpr int64_t kLanes = NV * kVector;
  for (int64_t n = 0; n < rows; ++n, y += kLanes) {
    const uint32_t row = static_cast<uint32_t>(row_of(n)), i = row / kOctet, r = row % kOctet;
    Vector sum[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sum[v] = add ? load<kVector>(y + v * kVector) : Vector{};
    for (int g = 0; g < count; ++g) {
      const OctetEntry e = entry[g][i];
      const float* line = s[g] + (kOctet * int64_t{e.octet} + residues[e.pattern][r]) * kLanes;
      const Vector sign = splat<kVector>(kSigns[e.signs >> r & 1]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sum[v] += sign * load<kVector>(line + v * kVector);
    }
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store<kVector>(y + v * kVector, sum[v]);
  }
}

// The same of any number of lanes that tiles have.
template <class RowOf>
void add_lines(int64_t lanes, const OctetEntry* const* entry, const float* const* s, int count,
               int64_t rows, const RowOf& row_of, const int32_t (*residues)[8], bool add,
               float* y) {
  switch (lanes / kVector) {
    case 1: return add_lines<1>(entry, s, count, rows, row_of, residues, add, y);
    case 2: return add_lines<2>(entry, s, count, rows, row_of, residues, add, y);
    case 4: return add_lines<4>(entry, s, count, rows, row_of, residues, add, y);
    case 8: return add_lines<8>(entry, s, count, rows, row_of, residues, add, y);
    default: return add_lines<16>(entry, s, count, rows, row_of, residues, add, y);
  }
}

// y [octets, M, 8] += ± S [octet, M, 8].
template <int M>
inline void add_octets(const OctetEntry* entry, int64_t octets, const float* s,
                       const int32_t (*residues)[8], float* y) {
  typedef FloatsOf<8>::integers Integers;
  const Integers to_sign = {31, 30, 29, 28, 27, 26, 25, 24};
  for (int64_t i = 0; i < octets; ++i, y += M * 8) {
    const OctetEntry e = entry[i];
    Integers order, bits, sign = {};
    std::memcpy(&order, residues[e.pattern], sizeof order);
    sign += e.signs;
    sign = (sign << to_sign) & static_cast<int32_t>(0x80000000);
    for (int m = 0; m < M; ++m) {
      const Floats<8> read = load<8>(s + (int64_t{e.octet} * M + m) * 8);
#if defined(__clang__)
      Floats<8> ordered;
      for (int r = 0; r < 8; ++r) ordered[r] = read[order[r]];
#else
      const Floats<8> ordered = __builtin_shuffle(read, order);
#endif
      std::memcpy(&bits, &ordered, sizeof bits);
      bits ^= sign;
      Floats<8> added;
      std::memcpy(&added, &bits, sizeof added);
      store<8>(y + m * 8, load<8>(y + m * 8) + added);
    }
  }
}

}  // namespace
}  // namespace rpg
