// What the kernels of a linear layer are given.

#pragma once

#include <cstdint>

#include "law/number.h"
#include "law/ring.h"

namespace rpg {

// Bytes of a workspace, and how many of them hold copies of activations.
struct Workspace {
  int64_t bytes;
  int64_t activations;
};

struct Image;  // conv2d.h

// y [batch, N] = scale · x [batch, K] · (G ring)ᵀ + bias; all contiguous.
struct LinearArgs {
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
  int batch_tile;      // 1, 4, 8 or 16 rows of x at a time
  int tiles;           // that are multiplied with what is tabulated once
  void* workspace;     // [linear_workspace] bytes, aligned to 64
  const Image* image;  // of a convolution: x and y are images, the batch is pixels; or null
};

// dx [batch, K] = scale · dy [batch, N] · (G ring); all contiguous.
struct LinearInputGradArgs {
  Dtype bank_dtype;
  const void* ring;  // [slots, block]
  Dtype dy_dtype;    // of dy and dx
  const void* dy;    // [batch, N]
  void* dx;          // [batch, K]
  int64_t batch;
  int64_t columns;  // K
  double scale;
  int threads;
  int batch_tile;
  int tiles;
  void* workspace;  // [linear_input_grad_workspace] bytes, aligned to 64
};

// dw [slots, block] += scale · Gᵀ · (dy [batch, N]ᵀ x [batch, K]); all contiguous.
struct LinearBankGradArgs {
  Dtype dtype;     // of dy and x
  const void* dy;  // [batch, N]
  const void* x;   // [batch, K]
  float* dw;       // [slots, block]
  int64_t batch;
  int64_t columns;  // K
  double scale;
  int threads;
  int batch_tile;
  int tiles;
  void* workspace;  // [linear_bank_grad_workspace] bytes, aligned to 64
};

}  // namespace rpg
