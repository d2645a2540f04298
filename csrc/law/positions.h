// Positions, for host and device: which one a row and a block of law 3 have, and which ones read a
// slot, that is both laws backwards.

#pragma once

#include "law/unit.h"

namespace rpg {

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

// Which row reads a residue of its octet's 8 slots: the inverse of residue_of.
RPG_LAW uint32_t row_at(uint32_t residue, uint32_t word) {
  return ((residue * (word >> 3 | 1) + word) & 7) ^ (word >> 29);
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
  uint32_t x = use - unit.use;
  if (!law.permute) return (unit.q + x) * kOctet + residue;
  for (int j = kShuffleRounds - 1; j >= 0; --j) {
    x = shuffle_round(x, unit.size, round_of(law, unit.number, unit.size, j));
  }
  const uint32_t q = unit.q + x;
  return q * kOctet + row_at(residue, hash_word(q, law.octet_key[0], law.octet_key[1]));
}

}  // namespace rpg
