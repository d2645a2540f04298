// What the kernels of linear layers that multiply int8 with int8 are given: a bank of int8 codes
// with a scale for each slot, and x, whose rows they round to int8, with a step for each row.

#pragma once

#include <cstdint>

#include "cpu/stored.h"
#include "cpu/workspace.h"
#include "law/layer.h"

namespace rpg {

// How codes are multiplied; sums are the same whole numbers in all of them.
enum class Int8Products : int {
  kPlain = 0,  // by what every processor has
  kDots = 1,   // by AVX512-VNNI: a word of 4 codes times words of x
  kTiles = 2,  // by AMX: 16 slots times 16 lanes of x
};

// y [batch, N] = scale · round(x) [batch, K] · (G ring)ᵀ + bias; all contiguous.
struct Int8LinearArgs {
  Bank bank;          // int8 with scales
  Dtype x_dtype;      // of x and y; sums of products by slot are fp32
  const void* x;      // [batch, K]
  const float* bias;  // [N] or null
  void* y;            // [batch, N]
  int64_t batch;
  int64_t columns;  // K
  double scale;
  int threads;
  int lanes;        // rows of x at a time
  void* workspace;  // as many bytes as the kernel says, aligned to 64
  Int8Products products;
};

}  // namespace rpg
