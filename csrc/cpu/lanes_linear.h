// What the kernels of linear layers that take rows of the batch as lanes of vectors are given:
// those of the unit law, and those that gather tiles of Ŵ (tile_linear.cpp).

#pragma once

#include <cstdint>

#include "cpu/linear.h"
#include "cpu/selection.h"

namespace rpg {

// y [batch, N] = scale · x [batch, K] · (G ring)ᵀ + bias; all contiguous. With a selection, of
// units, x has the chosen columns alone, and y and the bias have the chosen rows.
struct LanesLinearArgs {
  Bank bank;          // the ring: [slots, block]
  Dtype x_dtype;      // of x and y; sums are fp32
  const void* x;      // [batch, K]
  const float* bias;  // [N] or null
  void* y;            // [batch, N]
  int64_t batch;
  int64_t columns;  // K
  double scale;
  int threads;
  int lanes;        // rows of x at a time
  void* workspace;  // as many bytes as the kernel says, aligned to 64
  bool pairs;       // products of pairs (pairs.h): x and the bank are bfloat16; of units
  Selection selection;
};

// dx [batch, K] = scale · dy [batch, N] · (G ring), and
// dw [slots, block] += scale · Gᵀ · (dy [batch, N]ᵀ x [batch, K]); all
// contiguous. With a selection x and dx have the chosen columns alone, and dy has the chosen rows.
struct LanesLinearGradsArgs {
  Bank bank;       // the ring: [slots, block]; for dx
  Dtype dtype;     // of dy, x and dx
  const void* dy;  // [batch, N]
  const void* x;   // [batch, K]; for dw
  void* dx;        // [batch, K] or null
  float* dw;       // [slots, block] or null
  int64_t batch;
  int64_t columns;  // K
  double scale;
  int threads;
  int lanes;
  void* workspace;  // as many bytes as the kernel says, aligned to 64
  bool pairs;       // products of pairs (pairs.h): dy, x and the bank are bfloat16; of units
  Selection selection;
};

}  // namespace rpg
