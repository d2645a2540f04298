// Dot products of 8 slots of a bank with a few rows of x, where reading the bank takes as long as
// multiplying: slots are read as they are stored.
//
//   s [M, 8] = slots [8, block] · x_b [M, block]ᵀ
//
// Per vector of kDotVector elements and slot: a load and M multiply-adds; for two vectors of
// bfloat16 a load, a shift, a mask and 2 M multiply-adds; for codes of int8 a load that widens, a
// conversion and M multiply-adds. Sums of all lanes at the end: 14 additions and shuffles for 8.

#pragma once

#include <cstring>

#include "cpu/lanes.h"

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

#if defined(__AVX512F__)
constexpr int kDotVector = 16;
#elif defined(__AVX2__)
constexpr int kDotVector = 8;
#else
constexpr int kDotVector = 4;
#endif
typedef Floats<kDotVector> DotVector;
typedef FloatsOf<kDotVector>::integers DotIntegers;

// kDotVector words of the bank; MASKED: those bits of them that `mask` has. Zeros in x_b are not
// enough, since the bank may hold infinities.
template <bool MASKED>
inline DotIntegers load_bank(const char* source, const int32_t* mask) {
  DotIntegers words, kept;
  std::memcpy(&words, source, sizeof words);
  if constexpr (MASKED) {
    std::memcpy(&kept, mask, sizeof kept);
    words &= kept;
  }
  return words;
}

// The even and the odd elements of words of two bfloat16.
inline void split_pairs(const DotIntegers& words, DotVector& even, DotVector& odd) {
  DotIntegers upper, lower;
  lower = words << 16;
  upper = words & static_cast<int32_t>(0xFFFF0000);
  std::memcpy(&even, &lower, sizeof even);
  std::memcpy(&odd, &upper, sizeof odd);
}

// kDotVector codes of int8 as floats. By instructions: GCC 12 converts vectors of bytes one by one.
inline DotVector load_codes(const char* source) {
  DotIntegers codes;
#if defined(__AVX512F__)
  __asm__("vpmovsxbd %1, %0" : "=v"(codes) : "m"(*reinterpret_cast<const char (*)[16]>(source)));
#elif defined(__AVX2__)
  __asm__("vpmovsxbd %1, %0" : "=x"(codes) : "m"(*reinterpret_cast<const char (*)[8]>(source)));
#else
  for (int l = 0; l < kDotVector; ++l) codes[l] = static_cast<int8_t>(source[l]);
#endif
  return __builtin_convertvector(codes, DotVector);
}

// What the elements of slots are: floats, pairs of bfloat16, or codes of int8.
enum class Form { kFloats, kPairs, kCodes };

// Where 8 slots lie: one after the other, or each by itself.
struct SlotsInRow {
  const char* first;
  int64_t stride;
  const char* operator[](int i) const { return first + i * stride; }
};
struct SlotsApart {
  const char* slot[8];
  const char* operator[](int i) const { return slot[i]; }
};

// Lane j of the result is the sum of all lanes of x[j].
template <int LANES>
inline Floats<8> sum_eight(const Floats<LANES> (&x)[8]) {
  Floats<8> y[8];
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    if constexpr (LANES == 16) {
      alignas(64) float lanes[16];
      store<LANES>(lanes, x[j]);
      y[j] = load<8>(lanes) + load<8>(lanes + 8);
    } else if constexpr (LANES == 8) {
      y[j] = x[j];
    } else {
      alignas(32) float lanes[8] = {};
      store<LANES>(lanes, x[j]);
      y[j] = load<8>(lanes);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    y[j] = RPG_SHUFFLE8(y[j], y[j + 4], 0, 1, 2, 3, 8, 9, 10, 11) +
           RPG_SHUFFLE8(y[j], y[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    y[j] = RPG_SHUFFLE8(y[j], y[j + 2], 0, 1, 8, 9, 4, 5, 12, 13) +
           RPG_SHUFFLE8(y[j], y[j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  return RPG_SHUFFLE8(y[0], y[1], 0, 8, 2, 10, 4, 12, 6, 14) +
         RPG_SHUFFLE8(y[0], y[1], 1, 9, 3, 11, 5, 13, 7, 15);
}

// s [M, 8]: 8 slots times x_b [M, block] (of pairs: even elements first). MASKED: of those bits of
// a slot's words alone that `mask` has. Codes need no mask: they are finite, and x_b has zeros
// where a column is not chosen.
template <int M, Form FORM, bool MASKED, class Slots>
inline void dot_octet(const Slots& slots, const int32_t* mask, const float* x, int block,
                      float* s) {
  constexpr bool PAIRS = FORM == Form::kPairs;
  constexpr int kBytes = FORM == Form::kFloats ? 4 : PAIRS ? 2 : 1;
  constexpr int kSlots = 8 / M;  // whose sums stay in registers
#pragma GCC unroll 4
  for (int first = 0; first < 8; first += kSlots) {
    DotVector sum[8];  // [M, kSlots]
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sum[j] = DotVector{};
    constexpr int kStep = PAIRS ? 2 * kDotVector : kDotVector;
    for (int e = 0; e < block; e += kStep) {
#pragma GCC unroll 8
      for (int i = 0; i < kSlots; ++i) {
        const char* source = slots[first + i] + e * kBytes;
        if constexpr (PAIRS) {
          DotVector even, odd;
          split_pairs(load_bank<MASKED>(source, mask + e / 2), even, odd);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) {
            const float* xm = x + m * block + e;
            sum[m * kSlots + i] += even * load<kDotVector>(xm);
            sum[m * kSlots + i] += odd * load<kDotVector>(xm + kDotVector);
          }
        } else {
          DotVector w;
          if constexpr (FORM == Form::kCodes) {
            w = load_codes(source);
          } else {
            const DotIntegers words = load_bank<MASKED>(source, mask + e);
            std::memcpy(&w, &words, sizeof w);
          }
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) {
            sum[m * kSlots + i] += w * load<kDotVector>(x + m * block + e);
          }
        }
      }
    }
    if constexpr (M == 1) {
      store<8>(s, sum_eight<kDotVector>(sum));
      continue;
    }
    alignas(32) float sums[8];
    store<8>(sums, sum_eight<kDotVector>(sum));
    for (int m = 0; m < M; ++m) {
      std::memcpy(s + m * 8 + first, sums + m * kSlots, sizeof(float) * kSlots);
    }
  }
}

}  // namespace
}  // namespace rpg
