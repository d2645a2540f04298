// The unit law, for host and device: which bank slot, and with which sign, a virtual weight reads
// when units of rows and taps read each slot of a window `laps` times. docs/unit_law.md is its
// specification, rpg_kernels/law/unit.py its definition.
//
//   q    = (column octets + first(group)) taps + i       an octet of rows, at one tap; in a band
//   p    = 8 q + n mod 8                                 a position
//   use  = (P(column) octets + turned(column, group)) taps + shuffle(unit, i)
//   slot = (8 ((F + use) / laps) + residue(n mod 8, word(q))) mod slots
//   sign = a bit of word(p, w), or bit p mod 32 of word(p / 32, 0) for reflect "vector"
//
// The first use F of a band is reduced once, on the host; everything on p and on uses of a band is
// uint32 arithmetic: a band has less than 2^31 positions and 2^28 octets. Lane functions are as in
// law/ring.h. Budget of a lone position: P, 16 rounds of 19 instructions, 60 for the rest; kernels
// go unit by unit (cpu/unit_entries.h), where an octet takes a dozen.

#pragma once

#include "law/ring.h"

namespace rpg {

constexpr int kUnitLawVersion = 3;
constexpr uint32_t kOctet = 8;
constexpr int kShuffleRounds = 16;
constexpr uint32_t kMaxUnit = 1 << 15;  // octets
constexpr uint32_t kMaxUnitLaps = 64;
// Numbers of words, as those of signs: of an octet, of a column, of round 0 in a unit.
constexpr int kOctetWord = 16, kTurnWord = 17, kRoundWord = 18;

// What evaluating positions of one band takes.
struct UnitBand {
  Permutation permutation;  // P, of columns
  Divider by_slots, by_laps, by_taps, by_run_blocks, by_column, by_size, by_larger_size;
  uint32_t octets;      // of rows
  uint32_t taps;        // of a unit
  uint32_t run_blocks;  // channel blocks
  uint32_t columns;     // channel blocks times parts of the taps
  uint32_t groups;      // units of a column
  uint32_t size;        // octets of rows of a group; the first `larger` ones have one more
  uint32_t larger;
  uint32_t base;    // the first slot of the octet of ring that F uses
  uint32_t offset;  // F mod laps: uses of that octet before the band
  uint32_t octet_key[2], turn_key[2], round_key[2 * kShuffleRounds], sign_key[2 * kMaxWords];
  bool permute;
  bool vector;  // one sign for a block
};

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

RPG_LAW uint32_t first_octet(const UnitBand& law, uint32_t group) {
  return group * law.size + min_u32(group, law.larger);
}

// Octets of rows of a group.
RPG_LAW uint32_t group_size(const UnitBand& law, uint32_t group) {
  return law.size + (group < law.larger);
}

RPG_LAW uint32_t group_of(const UnitBand& law, uint32_t octet) {
  const uint32_t of_larger = law.larger * (law.size + 1);
  if (octet < of_larger) return divide(octet, law.by_larger_size);
  return divide(octet - of_larger, law.by_size) + law.larger;
}

// The position p of row n of the band and block b.
RPG_LAW uint32_t position_in_units(const UnitBand& law, uint32_t n, uint32_t b) {
  const uint32_t tap = divide(b, law.by_run_blocks), channel = b - tap * law.run_blocks;
  const uint32_t part = divide(tap, law.by_taps);
  const uint32_t column = part * law.run_blocks + channel;
  const uint32_t octet = n / kOctet, group = group_of(law, octet);
  const uint32_t first = first_octet(law, group);
  const uint32_t i = (tap - part * law.taps) * group_size(law, group) + octet - first;
  return ((column * law.octets + first) * law.taps + i) * kOctet + n % kOctet;
}

// A unit: octets q ... q + size - 1 read the uses use ... use + size - 1 of the ring, counted from
// the first use of the octet that begins at slot `base`.
struct Unit {
  uint32_t number;
  uint32_t q;
  uint32_t use;
  uint32_t size;
};

// The octet of rows that comes first in a column.
RPG_LAW uint32_t turn_of(const UnitBand& law, uint32_t column) {
  const uint32_t word = hash_word(column, law.turn_key[0], law.turn_key[1]);
  return law.permute ? first_octet(law, umulhi(word, law.groups)) : 0;
}

// Of columns: whose place each has, and its turn.
template <int LANES>
RPG_LAW void places_of(const UnitBand& law, const uint32_t (&column)[LANES],
                       uint32_t (&place)[LANES], uint32_t (&turn)[LANES]) {
  for (int l = 0; l < LANES; ++l) {
    turn[l] = turn_of(law, column[l]);
    place[l] = column[l];
  }
  if (law.permute) permute(law.permutation, place);
}

// The unit of a column with its place and turn.
RPG_LAW Unit unit_in_place(const UnitBand& law, uint32_t column, uint32_t group, uint32_t place,
                           uint32_t turn) {
  const uint32_t first = first_octet(law, group), turned = sub_mod(first, turn, law.octets);
  return {column * law.groups + group, (column * law.octets + first) * law.taps,
          (place * law.octets + turned) * law.taps + law.offset, group_size(law, group) * law.taps};
}

RPG_LAW Unit unit_at(const UnitBand& law, uint32_t column, uint32_t group) {
  uint32_t place[1], turn[1];
  places_of(law, {column}, place, turn);
  return unit_in_place(law, column, group, place[0], turn[0]);
}

// The window of a unit: `octets` octets from slot `base` on, around the end of the ring. Its first
// octet has been used `used` times by other units.
struct UnitWindow {
  uint32_t base;
  uint32_t octets;
  uint32_t used;
};

// What a round of the shuffle takes of its unit: the offset and the lower half of its word.
RPG_LAW uint32_t round_of(const UnitBand& law, uint32_t unit, uint32_t size, int j) {
  const uint32_t word = hash_word(unit, law.round_key[2 * j], law.round_key[2 * j + 1]);
  return ((word >> 16) * size & 0xFFFF0000u) | (word & 0xFFFF);
}

// One round of the shuffle: x and its partner change places, or not. x < size <= 2^15.
RPG_LAW uint32_t shuffle_round(uint32_t x, uint32_t size, uint32_t round) {
  const uint32_t offset = round >> 16, low = round & 0xFFFF;
  const uint32_t summand = (low << 8 | low >> 8) & 0xFFFF;
  const uint32_t partner = min_u32(offset - x, offset - x + size);
  const uint32_t larger = x < partner ? partner : x;
  return (larger * (low | 1) + summand) & 0x8000 ? partner : x;
}

template <bool INVERSE>
RPG_LAW uint32_t shuffled(const UnitBand& law, uint32_t unit, uint32_t size, uint32_t x) {
  for (int j = 0; law.permute && j < kShuffleRounds; ++j) {
    x = shuffle_round(x, size, round_of(law, unit, size, INVERSE ? kShuffleRounds - 1 - j : j));
  }
  return x;
}

// Which of its octet's 8 slots row r reads, and back; `word` is the octet's.
RPG_LAW uint32_t residue_of(uint32_t r, uint32_t word) {
  return ((r ^ (word >> 29)) - word) * (word >> 3 | 1) & 7;
}
RPG_LAW uint32_t row_at(uint32_t residue, uint32_t word) {
  return ((residue * (word >> 3 | 1) + word) & 7) ^ (word >> 29);
}

// The slot of a residue of the octet that a use reads.
RPG_LAW uint32_t slot_of_use(const UnitBand& law, uint32_t use, uint32_t residue) {
  const uint32_t unwrapped = divide(use, law.by_laps) * kOctet + residue;  // below 2^31 + 2^9
  const uint32_t slots = law.by_slots.divisor;
  const uint32_t rest = 2 * modulo(unwrapped / 2, law.by_slots) + (unwrapped & 1);
  return add_mod(law.base, min_u32(rest, rest - slots), slots);
}

RPG_LAW UnitWindow window_of(const UnitBand& law, const Unit& unit) {
  const uint32_t first = divide(unit.use, law.by_laps), laps = law.by_laps.divisor;
  const uint32_t used = unit.use - first * laps;
  return {slot_of_use(law, unit.use, 0), divide(used + unit.size + laps - 1, law.by_laps), used};
}

// How many octets of the ring the band has uses of; `offset` of the first one's are not its own.
RPG_LAW uint32_t ring_octets(const UnitBand& law) {
  const uint32_t uses = law.offset + law.columns * law.octets * law.taps;
  return divide(uses - 1, law.by_laps) + 1;
}

// Which unit has a use of the band; `use` counts as those of units do.
RPG_LAW Unit unit_with_use(const UnitBand& law, uint32_t use) {
  const uint32_t z = use - law.offset, size = law.by_column.divisor;
  const uint32_t place = divide(z, law.by_column);
  uint32_t column[1] = {place};
  if (law.permute) unpermute(law.permutation, column);
  const uint32_t turn = turn_of(law, column[0]);
  const uint32_t turned = add_mod(z - place * size, turn * law.taps, size);
  return unit_in_place(law, column[0], group_of(law, divide(turned, law.by_taps)), place, turn);
}

// The position that takes a use of the band and reads a residue of its octet: the inverse of
// slots_of. It may lie in the padding behind the band's last row.
RPG_LAW uint32_t position_of_use(const UnitBand& law, uint32_t use, uint32_t residue) {
  const Unit unit = unit_with_use(law, use);
  const uint32_t q = unit.q + shuffled<true>(law, unit.number, unit.size, use - unit.use);
  if (!law.permute) return q * kOctet + residue;
  return q * kOctet + row_at(residue, hash_word(q, law.octet_key[0], law.octet_key[1]));
}

// p -> slot, in place.
template <int LANES>
RPG_LAW void slots_of(const UnitBand& law, uint32_t (&p)[LANES]) {
  for (int l = 0; l < LANES; ++l) {
    const uint32_t q = p[l] / kOctet, column = divide(q, law.by_column);
    const uint32_t rest = q - column * law.by_column.divisor;
    const Unit unit = unit_at(law, column, group_of(law, divide(rest, law.by_taps)));
    const uint32_t use = unit.use + shuffled<false>(law, unit.number, unit.size, q - unit.q);
    const uint32_t r = p[l] % kOctet, word = hash_word(q, law.octet_key[0], law.octet_key[1]);
    p[l] = slot_of_use(law, use, law.permute ? residue_of(r, word) : r);
  }
}

// 32 sign bits of position p; with one sign for a block, bit 31 is that of p.
template <int LANES>
RPG_LAW void sign_words_of(const UnitBand& law, int w, const uint32_t (&p)[LANES],
                           uint32_t (&word)[LANES]) {
  const uint32_t k0 = law.sign_key[2 * w], k1 = law.sign_key[2 * w + 1];
  if (law.vector) {
    for (int l = 0; l < LANES; ++l) word[l] = hash_word(p[l] >> 5, k0, k1) << (~p[l] & 31);
  } else {
    for (int l = 0; l < LANES; ++l) word[l] = hash_word(p[l], k0, k1);
  }
}

}  // namespace rpg
