// Element types of banks and weights, and the type each is multiplied and added in.
//
// bfloat16 and float16 are converted with integer operations, which every compiler turns into
// vector instructions; both round to nearest, ties to even, as PyTorch does.

#pragma once

#include <cstdint>
#include <cstring>

#include "law/ring.h"

namespace rpg {

// kInt8: codes of a bank alone, which has scales.
enum class Dtype : int { kFloat64 = 0, kFloat32 = 1, kBfloat16 = 2, kFloat16 = 3, kInt8 = 4 };

namespace {  // compiled once per instruction set, see law/ring.h

RPG_LAW int element_bytes(Dtype dtype) {
  if (dtype == Dtype::kInt8) return 1;
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

RPG_LAW float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

RPG_LAW uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct Float64 {
  using Bits = uint64_t;
  using Compute = double;
  static constexpr Bits kSign = Bits{1} << 63;
  RPG_LAW double load(Bits bits) {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  RPG_LAW Bits store(double value) {
    Bits bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
  }
};

struct Float32 {
  using Bits = uint32_t;
  using Compute = float;
  static constexpr Bits kSign = Bits{1} << 31;
  RPG_LAW float load(Bits bits) { return as_float(bits); }
  RPG_LAW Bits store(float value) { return as_bits(value); }
};

struct Bfloat16 {
  using Bits = uint16_t;
  using Compute = float;
  static constexpr Bits kSign = Bits{1} << 15;
  RPG_LAW float load(Bits bits) { return as_float(uint32_t{bits} << 16); }
  RPG_LAW Bits store(float value) {
    const uint32_t bits = as_bits(value);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return static_cast<Bits>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
  }
};

struct Float16 {
  using Bits = uint16_t;
  using Compute = float;
  static constexpr Bits kSign = Bits{1} << 15;
  RPG_LAW float load(Bits half) {
    const uint32_t sign = uint32_t{half} << 16 & 0x80000000;
    const uint32_t rest = (uint32_t{half} & 0x7FFF) << 13;
    // Subnormal: the difference of two normal floats, so that it survives flushing to zero.
    const uint32_t subnormal = as_bits(as_float(rest | 0x38800000) - 0x1p-14f);
    const uint32_t finite = rest < 0x00800000 ? subnormal : rest + 0x38000000;
    return as_float(sign | (rest >= 0x0F800000 ? rest | 0x7F800000 : finite));
  }
  RPG_LAW Bits store(float value) {
    const uint32_t bits = as_bits(value);
    const uint32_t sign = bits >> 16 & 0x8000;
    const uint32_t magnitude = bits & 0x7FFFFFFF;
    // Normal: rebias and round the 13 bits that are dropped. Subnormal: the sum with 0.5 puts the
    // last place of a half at the last place of the float, and its rounding does the rest.
    const uint32_t normal = (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13;
    const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3F000000;
    const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
    const uint32_t large = magnitude > 0x7F800000 ? 0x7E00 : 0x7C00;
    return static_cast<Bits>(sign | (magnitude >= 0x477FF000 ? large : finite));
  }
};

}  // namespace
}  // namespace rpg
