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
// Budget: 8 instructions per Feistel round and lane, 9 per swap-or-not round, 11 per sign word.

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
constexpr int64_t kMaxBand = int64_t{1} << 31;
constexpr uint64_t kGolden64 = 0x9E3779B97F4A7C15ull;
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

RPG_HOST Divider make_divider(uint32_t divisor) {
  if (divisor == 1) return {1, 0, 0};
  uint32_t log = 0;
  while ((uint64_t{1} << log) < divisor) ++log;
  const uint64_t power = uint64_t{1} << (31 + log);
  return {divisor, static_cast<uint32_t>((power + divisor - 1) / divisor), log - 1};
}

RPG_LAW uint32_t divide(uint32_t n, const Divider& divider) {
  return divider.divisor == 1 ? n : umulhi(n, divider.magic) >> divider.shift;
}

RPG_LAW uint32_t modulo(uint32_t n, const Divider& divider) {
  return n - divide(n, divider) * divider.divisor;
}

// The splitmix64 finaliser.
RPG_HOST uint64_t mix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// The splitmix64 stream of (seed, layer, band); key i is the upper half of its number i.
struct KeyStream {
  uint64_t state;
};

RPG_HOST KeyStream make_keys(uint64_t seed, uint64_t layer, uint64_t band) {
  uint64_t state = mix64(seed + kGolden64);
  state = mix64(state + layer + kGolden64);
  return {mix64(state + band + kGolden64)};
}

RPG_HOST uint32_t key_at(const KeyStream& keys, int i) {
  return static_cast<uint32_t>(mix64(keys.state + (i + 1) * kGolden64) >> 32);
}

// The smaller factor of the most square product major * minor == size <= 2^31.
RPG_HOST uint32_t minor_factor(uint32_t size) {
  uint32_t root = 0;  // floor of the square root, bit by bit
  for (uint32_t bit = 1u << 15; bit; bit >>= 1) {
    if (uint64_t{root + bit} * (root + bit) <= size) root += bit;
  }
  while (size % root) --root;
  return root;
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

RPG_HOST Permutation make_permutation(uint32_t size, uint32_t minor, const KeyStream& keys) {
  Permutation p{};
  p.size = size;
  p.minor = minor;
  p.major = size / minor;
  p.by_minor = make_divider(minor);
  const uint64_t major = p.major, square = uint64_t{minor} * minor;
  if (minor >= 12 && major <= square * minor) {
    p.rounds = major > square ? 12 : major > 2 * uint64_t{minor} ? 10 : minor < 128 ? 8 : 6;
  } else {
    p.swap_rounds = size <= 1u << 16 ? 24 : 48;
  }
  const int count = p.rounds ? p.rounds : 2 * p.swap_rounds;
  for (int i = 0; i < count; ++i) p.key[i] = key_at(keys, i);
  for (int r = 0; r < p.swap_rounds; ++r) p.key[2 * r] = umulhi(p.key[2 * r], size);
  return p;
}

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

// P(q) -> q, in place.
template <int LANES>
RPG_LAW void unpermute(const Permutation& p, uint32_t (&q)[LANES]) {
  if (!p.rounds) {
    for (int r = p.swap_rounds - 1; r >= 0; --r) swap_or_not(p, r, q);
    return;
  }
  uint32_t i[LANES], j[LANES];
  for (int l = 0; l < LANES; ++l) {
    i[l] = divide(q[l], p.by_minor);
    j[l] = q[l] - i[l] * p.minor;
  }
  for (int r = p.rounds - 2; r >= 0; r -= 2) {
    for (int l = 0; l < LANES; ++l) {
      i[l] = sub_mod(i[l], round_value(j[l], p.key[r + 1], p.major), p.major);
      j[l] = sub_mod(j[l], round_value(i[l], p.key[r], p.minor), p.minor);
    }
  }
  for (int l = 0; l < LANES; ++l) q[l] = i[l] * p.minor + j[l];
}

// The law of one layer, as rpg_kernels.law.ring.LayerLaw.
struct LayerLaw {
  uint64_t seed;
  uint64_t layer;
  int64_t rows;
  int64_t blocks;
  int granularity;
  uint32_t slots;
  uint32_t start;
  Reflect reflect;
  bool permute;
  // Derived: rows of a band, and the smaller factor of a full band's positions and of the last's.
  int64_t rows_per_band;
  uint32_t minor;
  uint32_t last_minor;
  // Of the unit law (law/unit.h), instead of `start`; taps 0: the law of this file.
  uint32_t laps = 0;
  uint64_t address = 0;
  uint32_t taps = 0;         // of a unit
  uint32_t run_blocks = 0;   // blocks of a tap
  uint32_t groups = 0;       // of rows, each a unit of every column; in a full band
  uint32_t last_groups = 0;  // in the last band
};

// Sign words of a block.
RPG_LAW int words_of(const LayerLaw& law) {
  return law.reflect == Reflect::kVector ? 1 : (law.granularity + 31) / 32;
}

RPG_LAW int64_t bands_of(const LayerLaw& law) { return 1 + (law.rows - 1) / law.rows_per_band; }

// What evaluating positions of one band takes; passed to kernels by value.
struct BandLaw {
  Permutation permutation;
  Divider by_slots;
  uint32_t base;  // (start + v H blocks) mod slots
  bool permute;
  uint32_t sign_key[2 * kMaxWords];
};

RPG_HOST LayerLaw make_layer_law(uint64_t seed, uint64_t layer, int64_t rows, int64_t blocks,
                                 int granularity, uint32_t slots, uint32_t start, Reflect reflect,
                                 bool permute) {
  LayerLaw law{seed, layer, rows, blocks, granularity, slots, start, reflect, permute, rows, 1, 1};
  if (rows > kMaxBand / blocks) {
    law.rows_per_band = 1;
    while (2 * law.rows_per_band * blocks <= kMaxBand) law.rows_per_band *= 2;
  }
  const int64_t last_rows = rows - (bands_of(law) - 1) * law.rows_per_band;
  law.last_minor = minor_factor(static_cast<uint32_t>(last_rows * blocks));
  law.minor = last_rows == law.rows_per_band
                  ? law.last_minor
                  : minor_factor(static_cast<uint32_t>(law.rows_per_band * blocks));
  return law;
}

// The unit law of one layer. `address` is in uses of octets, not wrapped; all arguments are as
// rpg_kernels.law.unit checks them.
RPG_HOST LayerLaw make_unit_law(uint64_t seed, uint64_t layer, int64_t rows, int64_t blocks,
                                int granularity, uint32_t slots, uint64_t address, Reflect reflect,
                                bool permute, uint32_t laps, uint32_t taps, uint32_t run_blocks,
                                uint32_t groups, uint32_t last_groups) {
  LayerLaw law{seed, layer, rows, blocks, granularity, slots, 0, reflect, permute, rows, 1, 1};
  if ((rows + 7) / 8 > kMaxBand / 8 / blocks) {  // rows are padded to octets
    law.rows_per_band = 1;
    while (2 * law.rows_per_band * blocks <= kMaxBand) law.rows_per_band *= 2;
  }
  law.laps = laps;
  law.address = address;
  law.taps = taps;
  law.run_blocks = run_blocks;
  law.groups = groups;
  law.last_groups = last_groups;
  return law;
}

RPG_HOST BandLaw make_band_law(const LayerLaw& law, int64_t band) {
  const bool last = band == bands_of(law) - 1;
  const int64_t first = band * law.rows_per_band;
  const int64_t rows = last ? law.rows - first : law.rows_per_band;
  const KeyStream keys = make_keys(law.seed, law.layer, static_cast<uint64_t>(band));
  BandLaw out{};
  out.permutation = make_permutation(static_cast<uint32_t>(rows * law.blocks),
                                     last ? law.last_minor : law.minor, keys);
  out.by_slots = make_divider(law.slots);
  // first * blocks stays below 2^63: it is a number of positions.
  const uint64_t preceding = static_cast<uint64_t>(first) * static_cast<uint64_t>(law.blocks);
  out.base = static_cast<uint32_t>((law.start + preceding % law.slots) % law.slots);
  out.permute = law.permute;
  for (int i = 0; i < 2 * kMaxWords; ++i) out.sign_key[i] = key_at(keys, kSignKey + i);
  return out;
}

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
