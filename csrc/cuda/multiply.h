// The two ways in which the linear kernels multiply.

#pragma once

#include "cuda/device.h"
#include "law/number.h"

namespace rpg::RPG_DEVICE {

// 16-bit elements by tensor cores.
template <class T>
struct Mma {
  using Number = T;
  static constexpr bool kTensorCores = true;
};
// fp32 elements by fused multiply-add.
struct Fma {
  using Number = Float32;
  static constexpr bool kTensorCores = false;
};

RPG_FUNCTION void multiply(Mma<Bfloat16>, const MultiplyArgs& args) { multiply_bfloat16(args); }
RPG_FUNCTION void multiply(Mma<Float16>, const MultiplyArgs& args) { multiply_float16(args); }

}  // namespace rpg::RPG_DEVICE
