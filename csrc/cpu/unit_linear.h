// What the kernels of linear layers of the unit law are given.

#pragma once

#include <cstdint>

#include "cpu/linear.h"

namespace rpg {

// y [batch, N] = scale · x [batch, K] · (G ring)ᵀ + bias; all contiguous.
struct UnitLinearArgs {
  Dtype bank_dtype;
  const void* ring;   // [slots, block]
  Dtype x_dtype;      // of x and y; sums are fp32
  const void* x;      // [batch, K]
  const float* bias;  // [N] or null
  void* y;            // [batch, N]
  int64_t batch;
  int64_t columns;  // K
  double scale;
  int threads;
  int lanes;        // rows of x at a time
  void* workspace;  // [unit_linear_workspace] bytes, aligned to 64
};

// dx [batch, K] = scale · dy [batch, N] · (G ring), and
// dw [slots, block] = scale · Gᵀ · (dy [batch, N]ᵀ x [batch, K]), which is zero before; all
// contiguous.
struct UnitLinearGradsArgs {
  Dtype bank_dtype;
  const void* ring;  // [slots, block]; for dx
  Dtype dtype;       // of dy, x and dx
  const void* dy;    // [batch, N]
  const void* x;     // [batch, K]; for dw
  void* dx;          // [batch, K] or null
  float* dw;         // [slots, block] or null
  int64_t batch;
  int64_t columns;  // K
  double scale;
  int threads;
  int lanes;
  void* workspace;  // [unit_linear_grads_workspace] bytes, aligned to 64
};

}  // namespace rpg
