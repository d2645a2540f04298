// How a bank lies in memory, as callers say it.

#pragma once

#include <cstdint>

#include "law/number.h"

namespace rpg {

// Slot s of the bank is row `places[s]` of `data`, or row s where there are no places; where that
// is no row, its values are zeros, which take no memory. With scales `data` are codes, of which
// each is multiplied with its row's scale. A layer's block is a slot, or one of 2^shift equal parts
// of it, which share its place and its scale.
struct Bank {
  Dtype dtype;            // of data
  const void* data;       // [rows, 2^shift block]
  const float* scales;    // [rows] or null
  const int32_t* places;  // [slots] or null
  uint32_t rows;          // what places are less than; read where there are places
  int shift;              // read where there are places or scales

  bool plain() const { return !scales && !places; }
};

// A bank of plain values, of which slot s is row s.
inline Bank plain_bank(Dtype dtype, const void* data) { return {dtype, data, {}, {}, 0, 0}; }

}  // namespace rpg
