// The types that kernels use on both of their devices: included by csrc/cuda/device.h and
// csrc/simt/device.h once they have said which device it is.

#pragma once

#include <cstdint>

namespace rpg::RPG_DEVICE {

constexpr int kWarp = 32;

// How many CTAs a launch has, in three directions.
struct Grid {
  int x, y, z;
};

// N numbers that are read and written at once, at an address that is a multiple of their size.
template <class T, int N>
struct alignas(N * sizeof(T)) Vector {
  T value[N];
};

// c [16, 8] += a [16, 16] b [16, 8], fragments of mma.m16n8k16.
struct MultiplyArgs {
  float* c;           // [4]
  const uint32_t* a;  // [4]
  const uint32_t* b;  // [2]
};

}  // namespace rpg::RPG_DEVICE
