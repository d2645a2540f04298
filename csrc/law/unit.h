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

// What a round of the shuffle takes of its unit, two numbers in one word: the offset in the upper
// half, and the lower half of the round's hash in the lower. In the worked example of
// docs/unit_law.md the hash of round 1 is 0x6CCC27FD and the unit has 13 octets:
// 0x6CCC · 13 = 0x5865C, so the offset is 5 and the word 0x000527FD.
RPG_LAW uint32_t round_of(const UnitBand& law, uint32_t unit, uint32_t size, int j) {
  const uint32_t word = hash_word(unit, law.round_key[2 * j], law.round_key[2 * j + 1]);
  return ((word >> 16) * size & 0xFFFF0000u) | (word & 0xFFFF);
}

// One round of the shuffle: x and its partner change places, or not. x < size <= 2^15. With that
// word x = 4 has the partner 5 - 4 = 1; 4 · 0x27FD + 0xFD27 = 0x19D1B has bit 15, so x becomes 1.
RPG_LAW uint32_t shuffle_round(uint32_t x, uint32_t size, uint32_t round) {
  const uint32_t offset = round >> 16, low = round & 0xFFFF;
  const uint32_t summand = (low << 8 | low >> 8) & 0xFFFF;
  const uint32_t partner = min_u32(offset - x, offset - x + size);
  const uint32_t larger = x < partner ? partner : x;
  return (larger * (low | 1) + summand) & 0x8000 ? partner : x;
}

RPG_LAW uint32_t shuffled(const UnitBand& law, uint32_t unit, uint32_t size, uint32_t x) {
  for (int j = 0; law.permute && j < kShuffleRounds; ++j) {
    x = shuffle_round(x, size, round_of(law, unit, size, j));
  }
  return x;
}

// Which of its octet's 8 slots row r reads; `word` is the octet's. Row 5 with the word 0x4FFAFEC6:
// ((5 ^ 2) - 6) * 1, modulo 8 is 1.
RPG_LAW uint32_t residue_of(uint32_t r, uint32_t word) {
  return ((r ^ (word >> 29)) - word) * (word >> 3 | 1) & 7;
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

// p -> slot, in place.
template <int LANES>
RPG_LAW void slots_of(const UnitBand& law, uint32_t (&p)[LANES]) {
  for (int l = 0; l < LANES; ++l) {
    const uint32_t q = p[l] / kOctet, column = divide(q, law.by_column);
    const uint32_t rest = q - column * law.by_column.divisor;
    const Unit unit = unit_at(law, column, group_of(law, divide(rest, law.by_taps)));
    const uint32_t use = unit.use + shuffled(law, unit.number, unit.size, q - unit.q);
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
