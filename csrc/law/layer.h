// What the host makes of a generator's numbers, once for a layer: LayerLaw, as
// rpg_kernels.law.ring.LayerLaw and rpg_kernels.law.unit.UnitLaw, and the keys, dividers and
// permutation of a band, which law/ring.h and law/unit.h evaluate positions with.

#pragma once

#include "law/unit.h"

namespace rpg {

constexpr int64_t kMaxBand = int64_t{1} << 31;
constexpr uint64_t kGolden64 = 0x9E3779B97F4A7C15ull;

RPG_HOST Divider make_divider(uint32_t divisor) {
  if (divisor == 1) return {1, 0, 0};
  uint32_t log = 0;
  while ((uint64_t{1} << log) < divisor) ++log;
  const uint64_t power = uint64_t{1} << (31 + log);
  return {divisor, static_cast<uint32_t>((power + divisor - 1) / divisor), log - 1};
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
  // Of the unit law (law/unit.h), instead of `start`; taps 0: law 1 (law/ring.h).
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

RPG_HOST UnitBand make_unit_band(const LayerLaw& law, int64_t band) {
  const int64_t first_row = band * law.rows_per_band;
  const bool last = band == bands_of(law) - 1;
  const int64_t rows = last ? law.rows - first_row : law.rows_per_band;
  const KeyStream keys = make_keys(law.seed, law.layer, static_cast<uint64_t>(band));
  UnitBand out{};
  out.octets = static_cast<uint32_t>((rows + kOctet - 1) / kOctet);
  out.taps = law.taps;
  out.run_blocks = law.run_blocks;
  out.columns = static_cast<uint32_t>(law.blocks / law.taps);
  out.groups = last ? law.last_groups : law.groups;
  out.size = out.octets / out.groups;
  out.larger = out.octets % out.groups;
  // Addresses of a model end below 2^63.
  const uint64_t first =
      law.address + static_cast<uint64_t>(first_row / kOctet) * static_cast<uint64_t>(law.blocks);
  out.base = static_cast<uint32_t>(first / law.laps % law.slots * kOctet % law.slots);
  out.offset = static_cast<uint32_t>(first % law.laps);
  out.permutation = make_permutation(out.columns, minor_factor(out.columns), keys);
  out.by_slots = make_divider(law.slots);
  out.by_laps = make_divider(law.laps);
  out.by_taps = make_divider(law.taps);
  out.by_run_blocks = make_divider(law.run_blocks);
  out.by_column = make_divider(out.octets * out.taps);
  out.by_size = make_divider(out.size);
  out.by_larger_size = make_divider(out.size + 1);
  const auto read = [&](int word, uint32_t* key) {
    for (int i = 0; i < 2; ++i) key[i] = key_at(keys, kSignKey + 2 * word + i);
  };
  read(kOctetWord, out.octet_key);
  read(kTurnWord, out.turn_key);
  for (int j = 0; j < kShuffleRounds; ++j) read(kRoundWord + j, out.round_key + 2 * j);
  for (int w = 0; w < kMaxWords; ++w) read(w, out.sign_key + 2 * w);
  out.permute = law.permute;
  out.vector = law.reflect == Reflect::kVector;
  return out;
}

}  // namespace rpg
