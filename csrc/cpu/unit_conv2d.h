// What the kernels of convolutions of the unit law are given.

#pragma once

#include "cpu/conv2d.h"
#include "cpu/selection.h"

namespace rpg {

// y [images, N, out_height, out_width] = scale · conv2d(x [images, C, height, width], G ring) +
// bias. With a selection N and C are the chosen rows and columns, of x, y and the bias;
// image.channels counts the chosen, image.run all.
struct UnitConv2dArgs {
  Bank bank;      // the ring: [slots, block]
  Dtype dtype;    // of x and y; sums are fp32
  const void* x;  // strides: image.stride
  Image image;
  int64_t images;
  const float* bias;  // [N] or null
  void* y;            // channels-last or contiguous: image.channels_last
  int64_t kernel[2];
  double scale;
  int threads;
  int lanes;        // images at a time: 1, or a multiple of 8
  int64_t rows;     // of the output at a time
  void* workspace;  // as many bytes as the kernel says, aligned to 64
  bool pairs;       // products of pairs (pairs.h): x and the bank are bfloat16
  Selection selection;
};

// dx [images, C, height, width] of dy [images, N, out_height, out_width], and what is added to dw
// [slots, block].
struct UnitConv2dGradsArgs {
  Bank bank;    // the ring: [slots, block]; for dx
  Dtype dtype;  // of dy, x and dx
  const void* dy;
  int64_t dy_stride[4];
  const void* x;  // for dw; strides: image.stride
  Image image;
  int64_t images;
  void* dx;   // channels-last or contiguous: image.channels_last; or null
  float* dw;  // [slots, block] or null
  int64_t kernel[2];
  double scale;
  int threads;
  int lanes;        // images at a time: 1, or a multiple of 8
  int64_t rows;     // of x at a time; all of them where the convolution has a stride
  void* workspace;  // as many bytes as the kernel says, aligned to 64
  bool pairs;       // products of pairs (pairs.h): dy, x and the bank are bfloat16
  Selection selection;
};

}  // namespace rpg
