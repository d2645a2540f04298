// Squares of words, with which pixels whose channels lie side by side become lines of pixels and
// back: as many pixels as a vector has lanes, and as many words of each. A word is one channel of
// fp32, or two channels of 16 bits, the even one in its lower half.

#pragma once

#include "cpu/product.h"

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

constexpr int kSide = kVector < 8 ? 8 : kVector;
typedef Pairs<kSide> Words;

// x[j][i] = x[i][j], of vectors of 16 words: first within parts of four, by words and by twos, then
// by parts.
template <class Vector>
inline void transpose16(Vector (&x)[16]) {
#define RPG_ZIP_LOW 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define RPG_ZIP_HIGH 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
#define RPG_TWOS_LOW 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define RPG_TWOS_HIGH 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define RPG_PARTS_LOW 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define RPG_PARTS_HIGH 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define RPG_PARTS_EVEN 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27
#define RPG_PARTS_ODD 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31
  Vector y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = RPG_SHUFFLE16(x[i], x[i + 1], RPG_ZIP_LOW);
    y[i + 1] = RPG_SHUFFLE16(x[i], x[i + 1], RPG_ZIP_HIGH);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      x[i + 2 * k] = RPG_SHUFFLE16(y[i + k], y[i + k + 2], RPG_TWOS_LOW);
      x[i + 2 * k + 1] = RPG_SHUFFLE16(y[i + k], y[i + k + 2], RPG_TWOS_HIGH);
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const Vector p = RPG_SHUFFLE16(x[c], x[c + 4], RPG_PARTS_LOW);
    const Vector q = RPG_SHUFFLE16(x[c], x[c + 4], RPG_PARTS_HIGH);
    const Vector r = RPG_SHUFFLE16(x[c + 8], x[c + 12], RPG_PARTS_LOW);
    const Vector s = RPG_SHUFFLE16(x[c + 8], x[c + 12], RPG_PARTS_HIGH);
    y[c] = RPG_SHUFFLE16(p, r, RPG_PARTS_EVEN);
    y[c + 4] = RPG_SHUFFLE16(p, r, RPG_PARTS_ODD);
    y[c + 8] = RPG_SHUFFLE16(q, s, RPG_PARTS_EVEN);
    y[c + 12] = RPG_SHUFFLE16(q, s, RPG_PARTS_ODD);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = y[i];
}

inline void transpose(Pairs<16> (&x)[16]) { transpose16(x); }
inline void transpose(Pairs<8> (&x)[8]) { transpose8(x); }

// Words of the first `bytes` bytes, with zeros behind them.
inline Words load_part(const void* source, int64_t bytes) {
  if (bytes >= int64_t{sizeof(Words)}) return load_words<kSide>(source);
  char part[sizeof(Words)] = {};
  std::memcpy(part, source, bytes);
  return load_words<kSide>(part);
}

inline void store_part(const Words& words, int64_t bytes, void* target) {
  std::memcpy(target, &words, std::min<int64_t>(bytes, sizeof words));
}

// Channels of a word of elements T, as floats.
template <class T>
constexpr int kChannelsOf = static_cast<int>(sizeof(uint32_t) / sizeof(typename T::Bits));

template <class T>
inline void split(const Words& words, Floats<kSide> (&channel)[2]) {
  if constexpr (kChannelsOf<T> == 1) {
    channel[0] = as_floats<kSide>(words);
  } else {
    uint32_t bits[kSide];
    std::memcpy(bits, &words, sizeof bits);
    float even[kSide], odd[kSide];
#pragma omp simd
    for (int l = 0; l < kSide; ++l) {
      even[l] = T::load(static_cast<uint16_t>(bits[l]));
      odd[l] = T::load(static_cast<uint16_t>(bits[l] >> 16));
    }
    channel[0] = load<kSide>(even), channel[1] = load<kSide>(odd);
  }
}

template <class T>
inline Words join_as(const Floats<kSide> (&channel)[2]) {
  if constexpr (kChannelsOf<T> == 1) {
    return load_words<kSide>(&channel[0]);
  } else {
    float even[kSide], odd[kSide];
    store<kSide>(even, channel[0]), store<kSide>(odd, channel[1]);
    uint32_t bits[kSide];
#pragma omp simd
    for (int l = 0; l < kSide; ++l) {
      bits[l] = T::store(even[l]) | static_cast<uint32_t>(T::store(odd[l])) << 16;
    }
    return load_words<kSide>(bits);
  }
}

template <>
inline void split<Bfloat16>(const Words& words, Floats<kSide> (&channel)[2]) {
  channel[0] = as_floats<kSide>(words << 16);
  channel[1] = as_floats<kSide>(words & kUpper);
}

template <>
inline Words join_as<Bfloat16>(const Floats<kSide> (&channel)[2]) {
  return join<kSide>(rounded<kSide>(channel[0]), rounded<kSide>(channel[1]));
}

}  // namespace
}  // namespace rpg
