// What the convolution is given, and the two ends of a linear layer that make it one.

#pragma once

#include "cpu/linear.h"

namespace rpg {

// An image and how a kernel moves over it. Row m of the product is output pixel first + m of all
// images; element k of run r of a row of the virtual matrix is a channel of tap r or, where
// not by_tap, channel k % channels of tap k / channels (geometry.py).
struct Image {
  int64_t channels, height, width;  // of x [images, channels, height, width]
  int64_t stride[4];                // of x, in elements
  int64_t extent;                   // elements from the first of x to behind the last
  int64_t out_height, out_width;    // of y [images, N, out_height, out_width]
  bool channels_last;               // y; otherwise contiguous
  int64_t kernel_width;
  int64_t step[2], padding[2], dilation[2];
  bool by_tap;
  int64_t run, run_blocks;  // elements and blocks of a run
  int64_t first;
  // Where a tap lies, in rows and columns of x from the first tap on.
  int64_t tap_row(int64_t tap) const { return tap / kernel_width * dilation[0]; }
  int64_t tap_column(int64_t tap) const { return tap % kernel_width * dilation[1]; }
};

// y = scale · conv2d(x, G ring) + bias: `linear` over output pixels, dealt to `parts` threads each
// of which runs it with its own share of the workspace.
struct Conv2dArgs {
  LinearArgs linear;  // of one part; its `batch` is the pixels of all
  Image image;        // first: 0
  int parts;
  int64_t part_bytes;  // of the workspace, a multiple of 64
};

// Sums of rows m0 ... of the product, to be pixels of y.
struct PixelSums {
  float* const* sum;  // [count], each [tiles, height, lanes]
  int count;          // of parts that are added
  int64_t height;
  int lanes;
  int64_t m0, rows;
  int64_t n0;          // out-channel of the first of `height`
  int64_t begin, end;  // which of them are written
  int64_t out_channels;
};

#if defined(RPG_ISA)
namespace RPG_ISA {

// Rows m0 ... m0 + rows - 1 of one block, at most `lanes` (1, 4, 8 or 16) of them, as fp32 with
// zeros where there is nothing: out [size, lanes] or, with 1 or 4 lanes, [lanes, size].
void load_patches(const Image&, Dtype, const void* x, int64_t m0, int rows, int lanes,
                  int64_t block, int size, float* out);

void store_pixels(const Image&, const LinearArgs&, const PixelSums&);

}  // namespace RPG_ISA
#endif

}  // namespace rpg
