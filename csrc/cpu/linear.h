// What the kernels of a linear layer are given.

#pragma once

#include <cstdint>

#include "cpu/stored.h"
#include "cpu/workspace.h"
#include "law/layer.h"
#include "law/number.h"

namespace rpg {

struct Image;  // conv2d.h

// y [batch, N] = scale · x [batch, K] · (G ring)ᵀ + bias; all contiguous.
struct LinearArgs {
  Bank bank;          // the ring: [slots, block]
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

}  // namespace rpg
