// The entries of a tile's rows: which place of the stage each reads, and with which sign.
//
// In windows a thread makes the entries of an octet of rows. Its number in the unit goes through
// the 16 rounds of the shuffle, which units.h has found; that is the use of the window that
// the octet takes, so use / laps is the octet of the window, and a word of the octet's own says
// which of its 8 slots each row reads. For a tile of 1024 rows 128 threads do so.

#pragma once

#include "cuda/stage.h"

namespace rpg::RPG_DEVICE {

// The index of copy q modulo 4 of a place in S, at batch 1. 8 places have their copies behind each
// other, so that rows of four neighbouring octets read different banks: the law fixes no more of
// their places than the residues modulo 8.
RPG_FUNCTION int spread_place(int place, int q) {
  return (place & ~7) * 4 + (place & 7) + 8 * (q & 3);
}

// Writes the entries of all rows of a tile of windows in column b. SPREAD: of a place's four copies
// at batch 1, the one of its row's octet.
template <bool SPREAD>
RPG_FUNCTION void unit_entries(const Layer& layer, const Tile& tile, int b, const ColumnUnit& unit,
                               const Shared<uint32_t>& entry) {
  const UnitBand& law = layer.unit;
  RPG_LOOP
  for (int k = thread(); 8 * k < tile.rows; k += kThreads) {
    uint32_t i = tile.octet + k;  // The octet's number in the unit; then that of its use.
    if (law.permute) {
      RPG_UNROLL
      for (int j = 0; j < kShuffleRounds; ++j) i = shuffle_round(i, tile.size, unit.round[j]);
    }
    const uint32_t use = unit.used + i, octet = divide(use, law.by_laps);
    const uint32_t lap = use - octet * law.by_laps.divisor;
    const uint32_t q = b * law.octets + tile.row / 8 + k;  // in the band: units have one tap
    // With the word 0 each row is its own residue.
    const uint32_t word = law.permute ? hash_word(q, law.octet_key[0], law.octet_key[1]) : 0;
    uint32_t signs = 0;  // Bit r is the sign of row r; four octets share a word.
    if (layer.reflect == Reflect::kVector) {
      signs = hash_word(q / 4, law.sign_key[0], law.sign_key[1]) >> (q % 4 * 8);
    }
    // Lanes 4 to 7 of eight begin with the second half, so that the eight write to all banks.
    RPG_UNROLL
    for (int j = 0; j < 2; ++j) {
      const int first = 4 * (k / 4 % 2 ^ j);
      Vector<uint32_t, 4> out;
      RPG_UNROLL
      for (int t = 0; t < 4; ++t) {
        const int r = first + t;
        int place = static_cast<int>(kOctet * octet + residue_of(r, word));
        if (SPREAD) place = spread_place(place, k);
        out.value[t] = place | lap << 24 | (signs >> r & 1) << 31;
      }
      store(entry.span(8 * k + first, 4), out);
    }
  }
}

// Writes the entries of all rows of any other tile.
template <bool SPREAD>
RPG_FUNCTION void row_entries(const Layer& layer, const Tiling& tiling, const Tile& tile, int b,
                              const Stage& stage, const Shared<uint32_t>& entry) {
  RPG_LOOP
  for (int i = thread(); i < tile.rows; i += kThreads) {
    uint32_t place = i, sign;
    if (tiling.fill == Fill::kGather) {
      sign = stage.entries[i] & 0x80000000u;
    } else {
      const uint32_t p = position(layer, tile.row + i, b);
      place = ring_slot(layer, p), sign = block_sign(layer, p);
    }
    if (SPREAD) place = spread_place(place, i / 8);
    entry[i] = place | sign;
  }
}

}  // namespace rpg::RPG_DEVICE
