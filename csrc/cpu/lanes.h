// Activations in lanes, as kernels that take the batch in lanes want them: a tile of the batch is
// fp32, with the rows of the batch innermost ("lanes", [columns, L]) or as rows of blocks ("rows",
// [blocks, L, block]). Rows that a tile lacks are zeros, and so are columns behind the last.

#pragma once

#include <algorithm>

#include "cpu/simd.h"
#include "law/number.h"

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

// Elements of activations at an address; sizes and strides are in elements.
struct Activations {
  Dtype dtype;
  const void* data;
  const void* element(int64_t i) const {
    return static_cast<const char*>(data) + i * element_bytes(dtype);
  }
};

template <class T>
inline void convert_from(const void* source, int count, float* target) {
  const typename T::Bits* bits = static_cast<const typename T::Bits*>(source);
#pragma omp simd
  for (int i = 0; i < count; ++i) target[i] = T::load(bits[i]);
}

template <class T>
inline void convert_to(const float* source, int count, void* target) {
  typename T::Bits* bits = static_cast<typename T::Bits*>(target);
#pragma omp simd
  for (int i = 0; i < count; ++i) bits[i] = T::store(source[i]);
}

// `count` elements as fp32.
inline void read_some(Dtype dtype, const void* source, int count, float* target) {
  switch (dtype) {
    case Dtype::kBfloat16: return convert_from<Bfloat16>(source, count, target);
    case Dtype::kFloat16: return convert_from<Float16>(source, count, target);
    default: std::memcpy(target, source, sizeof(float) * count);
  }
}

inline void write_some(Dtype dtype, const float* source, int count, void* target) {
  switch (dtype) {
    case Dtype::kBfloat16: return convert_to<Bfloat16>(source, count, target);
    case Dtype::kFloat16: return convert_to<Float16>(source, count, target);
    default: std::memcpy(target, source, sizeof(float) * count);
  }
}

typedef uint16_t EightHalves __attribute__((vector_size(16)));

// 8 elements as fp32, in a register: GCC makes two stores of a copy of 32 bytes in memory, and a
// load of all of them must wait until both are written.
inline Floats<8> load_eight(Dtype dtype, const void* source) {
  if (dtype == Dtype::kFloat32) return load<8>(static_cast<const float*>(source));
  if (dtype == Dtype::kBfloat16) {
    EightHalves halves;
    std::memcpy(&halves, source, sizeof halves);
    const auto bits = __builtin_convertvector(halves, FloatsOf<8>::integers) << 16;
    Floats<8> out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
  }
  alignas(32) float out[8];
  convert_from<Float16>(source, 8, out);
  return load<8>(out);
}

inline void store_eight(Dtype dtype, const Floats<8>& values, void* target) {
  if (dtype == Dtype::kFloat32) return store<8>(static_cast<float*>(target), values);
  if (dtype == Dtype::kBfloat16) {  // the bits of Bfloat16::store, without a copy in memory
    FloatsOf<8>::integers bits;
    std::memcpy(&bits, &values, sizeof bits);
    const auto whole = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    const auto is_nan = (bits & 0x7FFFFFFF) > 0x7F800000;
    const EightHalves halves =
        __builtin_convertvector((is_nan & 0x7FC0) | (~is_nan & whole), EightHalves);
    std::memcpy(target, &halves, sizeof halves);
    return;
  }
  alignas(32) float out[8];
  store<8>(out, values);
  write_some(dtype, out, 8, target);
}

#if defined(__clang__)
#define RPG_SHUFFLE8(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define RPG_SHUFFLE8(a, b, ...) __builtin_shuffle(a, b, FloatsOf<8>::integers{__VA_ARGS__})
#endif

// x[j][i] = x[i][j], of vectors of floats or of words.
template <class Vector>
inline void transpose8(Vector (&x)[8]) {
  Vector y[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    y[i] = RPG_SHUFFLE8(x[i], x[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    y[i + 1] = RPG_SHUFFLE8(x[i], x[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      x[i + k] = RPG_SHUFFLE8(y[i + k], y[i + k + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      x[i + k + 2] = RPG_SHUFFLE8(y[i + k], y[i + k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    y[k] = RPG_SHUFFLE8(x[k], x[k + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    y[k + 4] = RPG_SHUFFLE8(x[k], x[k + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) x[k] = y[k];
}

// 8 rows, `stride` apart, of 8 columns of activations; only `rows` and `columns` of them exist.
inline void load_square(const Activations& x, int64_t first, int64_t stride, int rows, int columns,
                        Floats<8> (&out)[8]) {
  for (int i = 0; i < 8; ++i) {
    if (i < rows && columns >= 8) {
      out[i] = load_eight(x.dtype, x.element(first + i * stride));
      continue;
    }
    alignas(32) float row[8] = {};
    if (i < rows) read_some(x.dtype, x.element(first + i * stride), columns, row);
    out[i] = load<8>(row);
  }
}

// out [8 · ceil(columns / 8), L]: columns of `rows` rows of x, which begin at element `first`.
inline void pack_lanes(const Activations& x, int64_t first, int64_t stride, int64_t rows,
                       int64_t columns, int lanes, float* out) {
  for (int64_t k = 0; k < columns; k += 8) {
    for (int m = 0; m < lanes; m += 8) {
      Floats<8> square[8];
      load_square(x, first + m * stride + k, stride,
                  static_cast<int>(std::min<int64_t>(rows - m, 8)),
                  static_cast<int>(std::min<int64_t>(columns - k, 8)), square);
      transpose8(square);
      for (int i = 0; i < 8; ++i) store<8>(out + (k + i) * lanes + m, square[i]);
    }
  }
}

// out [L, block], of which a row takes `pitch`: one block of columns of `rows` rows of x.
inline void pack_rows(const Activations& x, int64_t first, int64_t stride, int64_t rows,
                      int64_t columns, int lanes, int block, int pitch, float* out) {
  const int valid = static_cast<int>(std::min<int64_t>(columns, block));
  for (int m = 0; m < lanes; ++m, out += pitch) {
    if (m < rows) read_some(x.dtype, x.element(first + m * stride), valid, out);
    const int written = m < rows ? valid : 0;
    std::memset(out + written, 0, sizeof(float) * (block - written));
  }
}

// Where rows of y go: y [batch, N] = scale · sums + bias.
struct Stored {
  Dtype dtype;
  void* y;
  int64_t columns;  // N
  float scale;
  const float* bias;               // [N] or null
  const float* of_rows = nullptr;  // [batch], what sums of a row of x are multiplied with too
};

// Writes rows `row` ... of Ŵ, `rows` of them, for `batch` rows of x from `m0` on. `sums` are
// `count` of [rows, lanes], all of which are added; there are lines for a multiple of 8 rows.
inline void store_lanes(const Stored& out, const float* const* sums, int count, int lanes,
                        int64_t row, int64_t rows, int64_t m0, int64_t batch) {
  const Floats<8> scale = splat<8>(out.scale);
  const int64_t size = element_bytes(out.dtype);
  for (int64_t n = 0; n < rows; n += 8) {
    const int valid = static_cast<int>(std::min<int64_t>(rows - n, 8));
    alignas(32) float bias[8] = {};
    if (out.bias) std::memcpy(bias, out.bias + row + n, sizeof(float) * valid);
    for (int64_t m = 0; m < batch; m += 8) {
      Floats<8> square[8];
      for (int i = 0; i < 8; ++i) {
        const int64_t place = (n + i) * lanes + m;
        square[i] = load<8>(sums[0] + place);
        for (int k = 1; k < count; ++k) square[i] += load<8>(sums[k] + place);
      }
      transpose8(square);
      for (int i = 0; i < 8 && m + i < batch; ++i) {
        if (out.of_rows) square[i] *= splat<8>(out.of_rows[m0 + m + i]);
        const Floats<8> y = square[i] * scale + load<8>(bias);
        void* target = static_cast<char*>(out.y) + ((m0 + m + i) * out.columns + row + n) * size;
        if (valid == 8) {
          store_eight(out.dtype, y, target);
          continue;
        }
        alignas(32) float values[8];
        store<8>(values, y);
        write_some(out.dtype, values, valid, target);
      }
    }
  }
}

}  // namespace
}  // namespace rpg
