// Rows of x, rounded to int8: x [m, k] is about step [m] · code, with
//
//   step = max |x| / 127        code = x · (127 / max |x|), to the nearest, ties to even
//
// in fp32. A row of which no element reaches kSmallest is zeros. One that holds an infinity or a
// NaN has zeros for codes and NaN for its step, so that all that is made of it is NaN.
//
// int8_rows.cpp is compiled without fused multiply-add: a product and its rounding are two
// operations, as they are in PyTorch.

#pragma once

#include <cstdint>

#include "law/number.h"

namespace rpg::RPG_ISA {

constexpr float kSmallest = 0x1p-120f;  // 127 / kSmallest is finite

struct RowRounding {
  float step, inverse;
};

// Of `count` elements at x.
RowRounding rounding_of(Dtype dtype, const void* x, int64_t count);

// codes [padded] of `count` elements at x, and zeros behind them.
void round_row(Dtype dtype, const void* x, int64_t count, const RowRounding& row, int64_t padded,
               int8_t* codes);

}  // namespace rpg::RPG_ISA
