#include "cpu/int8_rows.h"

#include "cpu/lanes.h"

namespace rpg::RPG_ISA {

namespace {

constexpr int kChunk = 256;  // elements that are converted at once

// The largest magnitude of `count` elements: without their signs, the bits of floats are ordered as
// they are, and those of infinities and of NaN are the largest.
template <class T, class Signed>
float largest(const void* source, int64_t count) {
  const Signed* bits = static_cast<const Signed*>(source);
  Signed top = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Signed magnitude = bits[i] & static_cast<Signed>(~T::kSign);
    top = top < magnitude ? magnitude : top;
  }
  return T::load(static_cast<typename T::Bits>(top));
}

// The nearest whole number of values below 2^22, ties to even: it is in the lowest bits of a sum
// with 1.5 · 2^23.
void round_some(const float* values, int count, float inverse, int8_t* codes) {
  for (int i = 0; i < count; ++i) {
    codes[i] = static_cast<int8_t>(as_bits(values[i] * inverse + 0x1.8p23f));
  }
}

}  // namespace

RowRounding rounding_of(Dtype dtype, const void* x, int64_t count) {
  float top = 0;
  switch (dtype) {
    case Dtype::kBfloat16: top = largest<Bfloat16, int16_t>(x, count); break;
    case Dtype::kFloat16: top = largest<Float16, int16_t>(x, count); break;
    default: top = largest<Float32, int32_t>(x, count);
  }
  constexpr uint32_t kInfinity = 0x7F800000;
  if (as_bits(top) >= kInfinity) return {as_float(0x7FC00000), 0};
  if (top < kSmallest) return {0, 0};
  return {top / 127, 127 / top};
}

void round_row(Dtype dtype, const void* x, int64_t count, const RowRounding& row, int64_t padded,
               int8_t* codes) {
  const Activations elements{dtype, x};
  if (row.inverse == 0) count = 0;
  for (int64_t done = 0; done < count; done += kChunk) {
    float values[kChunk];
    const int size = static_cast<int>(std::min<int64_t>(count - done, kChunk));
    read_some(dtype, elements.element(done), size, values);
    round_some(values, size, row.inverse, codes + done);
  }
  std::memset(codes + count, 0, padded - count);
}

}  // namespace rpg::RPG_ISA
