// Pairs: two neighbouring steps of a product in bfloat16, in one word of 32 bits, the even step in
// its lower half. A word of A times a word of B is two products, which one instruction adds to a
// sum in fp32 where the processor has AVX512-BF16; elsewhere shifts, masks and two multiply-adds
// give the same, up to numbers smaller than 2^-126, which that instruction takes for zeros.
//
// A step that is missing is a zero in both operands: an infinity that it met would become a NaN.

#pragma once

#include "cpu/isa.h"
#include "cpu/lanes.h"

// Compilers whose assemblers know the instruction.
#if defined(__AVX512F__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define RPG_DOT_PRODUCTS
#endif

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

template <int LANES>
using Pairs = typename FloatsOf<LANES>::integers;

constexpr int32_t kUpper = -0x10000;  // the bits of a word that its odd element has

template <int LANES>
inline Pairs<LANES> load_words(const void* words) {
  Pairs<LANES> x;
  std::memcpy(&x, words, sizeof x);
  return x;
}

template <int LANES>
inline Floats<LANES> as_floats(const Pairs<LANES>& words) {
  Floats<LANES> x;
  std::memcpy(&x, &words, sizeof x);
  return x;
}

#if defined(RPG_DOT_PRODUCTS)
constexpr bool kDotProducts = true;
#else
constexpr bool kDotProducts = false;
#endif

// Whether the processor multiplies pairs; asked once.
inline bool has_dot_products() {
#if defined(RPG_DOT_PRODUCTS)
  static const bool has = has_avx512_bf16();
  return has;
#else
  return false;
#endif
}

// sum += a · b, the odd products first, as the instruction does. DOT: by the instruction. It is
// written out, so that it takes no flag with which the rest would need such a processor too.
template <int LANES, bool DOT>
inline void add_pairs(Floats<LANES>& sum, const Pairs<LANES>& a, const Pairs<LANES>& b) {
#if defined(RPG_DOT_PRODUCTS)
  if constexpr (DOT) {
    Floats<LANES> total = sum;  // a variable of its own: GCC left operands of arrays in memory
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(total) : "v"(a), "v"(b));
    sum = total;
    return;
  }
#endif
  sum += as_floats<LANES>(a & kUpper) * as_floats<LANES>(b & kUpper);
  sum += as_floats<LANES>(a << 16) * as_floats<LANES>(b << 16);
}

// Words of two vectors of floats that bfloat16 holds exactly.
template <int LANES>
inline Pairs<LANES> join(const Floats<LANES>& even, const Floats<LANES>& odd) {
  const Pairs<LANES> low = load_words<LANES>(&even), high = load_words<LANES>(&odd);
  return (low >> 16 & ~kUpper) | (high & kUpper);
}

// What bfloat16 holds of numbers, ties to even; NaN stays NaN. The bits of Bfloat16::store.
template <int LANES>
inline Floats<LANES> rounded(const Floats<LANES>& values) {
  const Pairs<LANES> bits = load_words<LANES>(&values);
  const Pairs<LANES> whole = (bits + 0x7FFF + (bits >> 16 & 1)) & kUpper;
  const Pairs<LANES> is_nan = (bits & 0x7FFFFFFF) > 0x7F800000;
  return as_floats<LANES>((is_nan & 0x7FC00000) | (~is_nan & whole));
}

// words [ceil(count / 2), columns] of rows [count, columns], `stride` floats apart, rounded;
// columns are a multiple of 8. The words may take the place of the rows.
inline void join_rows(const float* rows, int64_t stride, int64_t count, int64_t columns,
                      uint32_t* words) {
  for (int64_t k = 0; k < count; k += 2, rows += 2 * stride, words += columns) {
    for (int64_t i = 0; i < columns; i += 8) {
      const Floats<8> odd = k + 1 < count ? load<8>(rows + stride + i) : Floats<8>{};
      const Pairs<8> joined = join<8>(rounded<8>(load<8>(rows + i)), rounded<8>(odd));
      std::memcpy(words + i, &joined, sizeof joined);
    }
  }
}

// The halves that bfloat16 has of a vector's numbers. DOT: by the instruction, which takes numbers
// smaller than 2^-126 for zeros, as the one that multiplies them does.
template <int LANES>
struct HalvesOf {
  typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
};

template <int LANES, bool DOT>
inline typename HalvesOf<LANES>::halves round_to_halves(const Floats<LANES>& values) {
  typedef typename HalvesOf<LANES>::halves Halves;
#if defined(RPG_DOT_PRODUCTS)
  if constexpr (DOT) {
    Halves halves;
    __asm__("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(values));
    return halves;
  }
#endif
  const Floats<LANES> whole = rounded<LANES>(values);
  return __builtin_convertvector(load_words<LANES>(&whole) >> 16, Halves);
}

// Lines `even` and `odd` [floats] of two neighbouring steps, rounded, as words of both steps, one
// for each lane, and as words of two lanes, which are the halves of a line; where wanted. All are
// whole vectors.
template <int LANES, bool DOT>
inline void round_lines(const float* even, const float* odd, int64_t floats, uint32_t* of_steps,
                        uint16_t* of_even, uint16_t* of_odd) {
  for (int64_t i = 0; i < floats; i += LANES) {
    const auto low = round_to_halves<LANES, DOT>(load<LANES>(even + i));
    const auto high = round_to_halves<LANES, DOT>(load<LANES>(odd + i));
    if (of_steps) {
      const Pairs<LANES> words = __builtin_convertvector(low, Pairs<LANES>) |
                                 __builtin_convertvector(high, Pairs<LANES>) << 16;
      std::memcpy(of_steps + i, &words, sizeof words);
    }
    if (!of_even) continue;
    std::memcpy(of_even + i, &low, sizeof low);
    std::memcpy(of_odd + i, &high, sizeof high);
  }
}

// out [4 · ceil(columns / 8), L] words: pairs of columns of `rows` rows of x in bfloat16, which
// begin at element `first`; as pack_lanes.
inline void pack_lane_pairs(const Activations& x, int64_t first, int64_t stride, int64_t rows,
                            int64_t columns, int lanes, uint32_t* out) {
  for (int64_t k = 0; k < columns; k += 8, out += 4 * lanes) {
    for (int m = 0; m < lanes; m += 8) {
      Floats<8> square[8];
      load_square(x, first + m * stride + k, stride,
                  static_cast<int>(std::min<int64_t>(rows - m, 8)),
                  static_cast<int>(std::min<int64_t>(columns - k, 8)), square);
      transpose8(square);
      for (int i = 0; i < 4; ++i) {
        const Pairs<8> words = join<8>(square[2 * i], square[2 * i + 1]);
        std::memcpy(out + i * lanes + m, &words, sizeof words);
      }
    }
  }
}

}  // namespace
}  // namespace rpg
