// The packing law, version 1, for host and device: which bank slot, and with which sign, a virtual
// weight reads. docs/law.md is its specification, rpg_kernels/law/ring.py its definition, and
// tests/golden/law1.json the values that must never change.
//
//   band v = n / H                        H rows per band, at most 2^31 positions each
//   q      = (n - v H) blocks + b         0 <= q < Q <= 2^31
//   slot   = (start + v H blocks + P(q)) mod slots
//   sign   = a bit of word(q, w)          w = element / 32
//
// Everything on q is uint32 arithmetic. Functions take LANES positions at once: one in a CUDA
// thread, a few dozen on a CPU, where the loops over lanes become vector instructions.
// law/layer.h makes what they take, on the host, once for a layer; law/positions.h says which
// positions read a slot. Budget: 8 instructions per Feistel round and lane, 9 per swap-or-not
// round, 11 per sign word.

#pragma once

#include <cstdint>

// Internal linkage: these are compiled once per instruction set, and the linker must not mix them.
#define RPG_HOST static inline
#if defined(__CUDACC__)
#define RPG_LAW static __host__ __device__ __forceinline__
#else
#define RPG_LAW static inline
#endif

namespace rpg {

constexpr int kLawVersion = 1;
constexpr int kMaxKeys = 96;   // 48 rounds of swap-or-not with two keys each
constexpr int kSignKey = 128;  // word w uses keys 128 + 2w and 129 + 2w
constexpr int kMaxWords = 4;   // of a block of 128 elements

enum class Reflect : int { kNone = 0, kVector = 1, kElement = 2 };

RPG_LAW uint32_t umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

RPG_LAW constexpr uint32_t min_u32(uint32_t a, uint32_t b) { return a < b ? a : b; }

// (a + b) mod m and (a - b) mod m of a, b < m <= 2^31, without a branch.
RPG_LAW uint32_t add_mod(uint32_t a, uint32_t b, uint32_t m) { return min_u32(a + b, a + b - m); }
RPG_LAW uint32_t sub_mod(uint32_t a, uint32_t b, uint32_t m) { return min_u32(a - b, a - b + m); }

// f(x, k, size): a number from 0 to size - 1.
RPG_LAW uint32_t round_value(uint32_t x, uint32_t key, uint32_t size) {
  uint32_t h = (x ^ key) * 0x7FEB352Du;
  h = (h ^ (h >> 15)) * 0x846CA68Bu;
  return umulhi(h, size);
}

// n / divisor of n < 2^31 by a product: magic = ceil(2^(31 + l) / divisor), l = ceil(log2 divisor)
// is exact there (Granlund and Montgomery, 1994).
struct Divider {
  uint32_t divisor;
  uint32_t magic;
  uint32_t shift;
};

RPG_LAW uint32_t divide(uint32_t n, const Divider& divider) {
  return divider.divisor == 1 ? n : umulhi(n, divider.magic) >> divider.shift;
}

RPG_LAW uint32_t modulo(uint32_t n, const Divider& divider) {
  return n - divide(n, divider) * divider.divisor;
}

// A keyed bijection of [0, size): an alternating mixed-radix Feistel network on the two digits of
// the most square product, or swap-or-not where there is no such product.
struct Permutation {
  uint32_t size;
  uint32_t major;
  uint32_t minor;
  int rounds;  // of Feistel; 0: swap-or-not
  int swap_rounds;
  Divider by_minor;
  uint32_t key[kMaxKeys];  // swap-or-not: pivots (already times size) and keys in turn
};

template <int LANES>
RPG_LAW void swap_or_not(const Permutation& p, int r, uint32_t (&q)[LANES]) {
  const uint32_t pivot = p.key[2 * r], key = p.key[2 * r + 1];
  for (int l = 0; l < LANES; ++l) {
    const uint32_t partner = sub_mod(pivot, q[l], p.size);
    const uint32_t larger = q[l] < partner ? partner : q[l];
    q[l] = round_value(larger, key, 2) ? partner : q[l];
  }
}

// q -> P(q), in place.
template <int LANES>
RPG_LAW void permute(const Permutation& p, uint32_t (&q)[LANES]) {
  if (!p.rounds) {
    for (int r = 0; r < p.swap_rounds; ++r) swap_or_not(p, r, q);
    return;
  }
  uint32_t i[LANES], j[LANES];
  for (int l = 0; l < LANES; ++l) {
    i[l] = divide(q[l], p.by_minor);
    j[l] = q[l] - i[l] * p.minor;
  }
  for (int r = 0; r < p.rounds; r += 2) {
    for (int l = 0; l < LANES; ++l) {
      j[l] = add_mod(j[l], round_value(i[l], p.key[r], p.minor), p.minor);
      i[l] = add_mod(i[l], round_value(j[l], p.key[r + 1], p.major), p.major);
    }
  }
  for (int l = 0; l < LANES; ++l) q[l] = i[l] * p.minor + j[l];
}

// What evaluating positions of one band takes; passed to kernels by value.
struct BandLaw {
  Permutation permutation;
  Divider by_slots;
  uint32_t base;  // (start + v H blocks) mod slots
  bool permute;
  uint32_t sign_key[2 * kMaxWords];
};

// 32 pseudorandom bits of x.
RPG_LAW uint32_t hash_word(uint32_t x, uint32_t k0, uint32_t k1) {
  uint32_t h = x ^ k0;
  h = (h ^ (h >> 17)) * 0xED5AD4BBu;
  h = (h ^ (h >> 11) ^ k1) * 0xAC4C1B51u;
  h = (h ^ (h >> 15)) * 0x31848BABu;
  return h ^ (h >> 14);
}

// q -> slot, in place.
template <int LANES>
RPG_LAW void slots_of(const BandLaw& law, uint32_t (&q)[LANES]) {
  if (law.permute) permute(law.permutation, q);
  const Divider by_slots = law.by_slots;
  for (int l = 0; l < LANES; ++l)
    q[l] = add_mod(law.base, modulo(q[l], by_slots), by_slots.divisor);
}

// 32 sign bits of block position q: those of elements 32 w to 32 w + 31.
template <int LANES>
RPG_LAW void sign_words_of(const BandLaw& law, int w, const uint32_t (&q)[LANES],
                           uint32_t (&word)[LANES]) {
  const uint32_t k0 = law.sign_key[2 * w], k1 = law.sign_key[2 * w + 1];
  for (int l = 0; l < LANES; ++l) word[l] = hash_word(q[l], k0, k1);
}

// The bit of its word that belongs to element e: bits 15 - p and 31 - p are those of pair p.
RPG_LAW int sign_bit(int e) { return 15 - (e % 32) / 2 + 16 * (e % 2); }

}  // namespace rpg
