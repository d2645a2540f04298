// The scramble of the window law, for host and device: the permutation of a window's slots, another
// one in each lap, which gives the 8 neighbouring rows of an octet places that differ modulo 8.
// docs/window_law.md is its specification, rpg_kernels/law/scramble.py its definition.

#pragma once

#include "law/ring.h"

namespace rpg {

constexpr uint64_t kRingLayer = ~uint64_t{0};  // The layer number whose keys scramble the ring.
constexpr uint32_t kMaxRounds = 8;             // of a scramble, which has 7 or 8

// The permutation of the window in each lap.
struct Scramble {
  uint32_t window;  // blocks, a power of two from 64
  uint32_t bits;    // of an octet's number: log2(window / 8)
  uint32_t rounds;
  uint32_t shift;
  uint32_t key[6];  // of words 0, 1, 2: of an octet, of factors, of summands
};

RPG_HOST uint32_t log2_floor(uint64_t x) {
  uint32_t log = 0;
  while (x >>= 1) ++log;
  return log;
}

RPG_HOST Scramble make_scramble(uint32_t window, uint64_t seed) {
  const uint32_t bits = log2_floor(window) - 3;
  Scramble out{window, bits, bits >= 5 ? 7u : 8u, bits >= 4 ? bits / 2 : 1u, {}};
  const KeyStream keys = make_keys(seed, kRingLayer, 0);
  for (int i = 0; i < 6; ++i) out.key[i] = key_at(keys, kSignKey + i);
  return out;
}

// Residue modulo 8 of row r of an octet, and back; h is the octet's word.
RPG_LAW uint32_t residue(uint32_t r, uint32_t h) {
  return ((r ^ (h >> 29)) - h) * (h >> 3 | 1) & 7;
}
RPG_LAW uint32_t row_of_residue(uint32_t c, uint32_t h) {
  return ((c * (h >> 3 | 1) + h) & 7) ^ (h >> 29);
}

// y with x y = 1 modulo 2^24, of an odd x: each step doubles the right bits, 3 at first.
RPG_LAW uint32_t odd_inverse(uint32_t x) {
  uint32_t y = x;
  for (int i = 0; i < 3; ++i) y *= 2 - x * y;
  return y;
}

// Position j of a lap -> place in the window, written to j; `lap` modulo 2^32. Here and below,
// loops write to local arrays, which cannot overlap a law: otherwise they do not become vector
// instructions.
template <int LANES>
RPG_LAW void scramble(const Scramble& s, const uint32_t (&lap)[LANES], uint32_t (&j)[LANES]) {
  const uint32_t bits = s.bits, shift = s.shift, mask = (1u << bits) - 1;
  uint32_t a[LANES], c[LANES], factors[LANES], summands[LANES];
  for (int l = 0; l < LANES; ++l) {
    a[l] = j[l] >> 3;
    c[l] = residue(j[l] & 7, hash_word((lap[l] << bits) + a[l], s.key[0], s.key[1]));
    factors[l] = hash_word(8 * lap[l] + c[l], s.key[2], s.key[3]);
    summands[l] = hash_word(8 * lap[l] + c[l], s.key[4], s.key[5]);
  }
  for (uint32_t r = 0; r < kMaxRounds; ++r) {
    if (r >= s.rounds) break;
    for (int l = 0; l < LANES; ++l) {
      const uint32_t x = (a[l] * (factors[l] >> 4 * r | 1) + (summands[l] >> 4 * r)) & mask;
      a[l] = x ^ (x >> shift);
    }
  }
  for (int l = 0; l < LANES; ++l) j[l] = 8 * a[l] + c[l];
}

// Place in the window -> position of the lap, written to j.
template <int LANES>
RPG_LAW void unscramble(const Scramble& s, const uint32_t (&lap)[LANES], uint32_t (&j)[LANES]) {
  const uint32_t bits = s.bits, shift = s.shift, mask = (1u << bits) - 1;
  uint32_t a[LANES], row[LANES], factors[LANES], summands[LANES];
  for (int l = 0; l < LANES; ++l) {
    a[l] = j[l] >> 3;
    factors[l] = hash_word(8 * lap[l] + (j[l] & 7), s.key[2], s.key[3]);
    summands[l] = hash_word(8 * lap[l] + (j[l] & 7), s.key[4], s.key[5]);
  }
  for (uint32_t r = s.rounds; r-- > 0;) {
    uint32_t high[LANES];  // undoes a ^= a >> shift from the top down
    for (int l = 0; l < LANES; ++l) high[l] = a[l];
    for (uint32_t t = shift; t < bits; t += shift) {
      for (int l = 0; l < LANES; ++l) high[l] = a[l] ^ (high[l] >> shift);
    }
    for (int l = 0; l < LANES; ++l) {
      const uint32_t inverse = odd_inverse(factors[l] >> 4 * r | 1);
      a[l] = (high[l] - (summands[l] >> 4 * r)) * inverse & mask;
    }
  }
  for (int l = 0; l < LANES; ++l) {
    const uint32_t h = hash_word((lap[l] << bits) + a[l], s.key[0], s.key[1]);
    row[l] = row_of_residue(j[l] & 7, h);
  }
  for (int l = 0; l < LANES; ++l) j[l] = 8 * a[l] + row[l];
}

}  // namespace rpg
