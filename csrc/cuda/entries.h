// The entries of a tile's rows: which place of the stage each reads, and with which sign.
//
// In windows they are made class by class, as csrc/cpu/unit_table.h does it: the places 8 A + c of
// a lap come from octet o and residue c alone, so a lane keeps one c and the keys of its rounds. It
// takes two places at once, of octets 4 apart, as halves of one word: no sum or product of A, up to
// 6 bits, carries out of a half. A round is 4 instructions for both. The row that reads a place
// follows from c and the octet's word; words of 16 octets and both keys of 8 residues are one hash,
// each lane another's, exchanged by shuffles.
//
// Budget, as compiled for sm_90a: a warp takes 128 rows, 16 octets, with one set of keys: 50
// instructions for the keys and 60 for each stretch of 64 rows, so 42 for 32 rows, 0.7 for a weight
// of blocks of 64 with what columns.h finds.

#pragma once

#include "cuda/stage.h"

namespace rpg::RPG_DEVICE {

constexpr uint32_t kPair = 0x10001;  // times 16 bits: the same bits in both halves

// What a lane does in the same way in all laps. Its one hash gives the factors of a residue, or the
// summands of one, or the word of an octet.
struct EntryLane {
  uint32_t shift, times, plus, key[2];
  uint32_t mask, pair_mask;  // They keep the number of an octet, and of two in halves.
  uint32_t octets;           // Octets 0 to 3 and 4 to 7, in two halves.
  uint32_t octet_bits;       // Bits 30 and 31: modulo 4, the octet that it hashes.
  uint32_t place_step;       // Octet a of a lane's residue has place place_step a + first_place,
  uint32_t first_place;      // which stands in both halves.
};

RPG_FUNCTION EntryLane lane_of(const WindowBand& law, Entries entries) {
  const Scramble& s = law.scramble;
  const uint32_t lane = thread() % kWarp, key_index = lane < 8 ? 2 : lane < 16 ? 4 : 0;
  const uint32_t mask = (1u << s.bits) - 1;
  const bool octets = key_index == 0;
  const uint32_t plus = octets ? (law.lap << s.bits) + lane - 16 : 8 * law.lap + (lane & 7);
  const uint32_t key0 = octets ? s.key[0] : key_index == 2 ? s.key[2] : s.key[4];
  const uint32_t key1 = octets ? s.key[1] : key_index == 2 ? s.key[3] : s.key[5];
  return {kept(octets ? 3 : s.bits + 3),
          kept(octets ? 1u : 8u),
          kept(plus),
          {kept(key0), kept(key1)},
          kept(mask),
          kept(mask * kPair),
          kept(lane / 8 * kPair + (4 << 16)),
          kept(lane << 30),
          entries == Entries::kSpread ? 32u : 8u,
          kept((entries == Entries::kSpread ? lane : lane & 7) * kPair)};
}

// Row first + offset of a tile, one of the 32 rows that begin with `first`. It reads `place` of its
// window, or what spread_place makes of it, with its sign in bit 31 of `sign`.
struct Row {
  int first, offset;
  uint32_t place, sign;
};

// Calls visit(row, stretch) for this lane's rows of STRETCHES stretches of one lap, from number
// `number` on. PLAIN: the law permutes, in seven rounds.
template <int STRETCHES, bool PLAIN, class Visit>
RPG_FUNCTION void visit_lap(const WindowBand& law, const EntryLane& lane, const ColumnReads& column,
                            int number, const Visit& visit) {
  const Scramble& s = law.scramble;
  const uint32_t c = thread() & 7;
  const int quarter = thread() % kWarp / 8;
  Stretch stretch[STRETCHES];
  RPG_UNROLL
  for (int i = 0; i < STRETCHES; ++i)
    stretch[i] = load<Stretch>(column.stretches.span(number + i, 1));
  const uint32_t x = (stretch[0].address >> lane.shift) * lane.times + lane.plus;
  uint32_t h = hash_word(x, lane.key[0], lane.key[1]);
  const uint32_t f = shuffle(h, c), g = shuffle(h, 8 + c);
  uint32_t a[STRETCHES];
  a[0] = (stretch[0].address >> 3 & lane.mask) * kPair + lane.octets;
  RPG_UNROLL
  for (int i = 1; i < STRETCHES; ++i) a[i] = a[0] + 8 * i * kPair;
  const auto round = [&](uint32_t r) {
    const uint32_t factor = (f >> (4 * r) & lane.mask) | 1;
    const uint32_t summand = byte_twice(r & 1 ? g >> 4 : g, r / 2);
    RPG_UNROLL
    for (int i = 0; i < STRETCHES; ++i) {
      const uint32_t y = (a[i] * factor + summand) & lane.pair_mask;
      a[i] = (y ^ (y >> s.shift)) & lane.pair_mask;
    }
  };
  if (PLAIN || law.permute) {
    RPG_UNROLL
    for (uint32_t r = 0; r < kMaxRounds - 1; ++r) round(r);
    if (!PLAIN && s.rounds == kMaxRounds) round(kMaxRounds - 1);
  } else {
    h = 0;
  }
  // What row_of_residue takes from the octet's word: `odd` it multiplies with, bits 0 to 2 of
  // `word` it adds, and bits 27 to 31 change the row: three are the word's, two are the octet's
  // number among four.
  const uint32_t odd = h >> 3 | 1, word = (h & 7) | (h >> 29) << 27 | lane.octet_bits;
  RPG_UNROLL
  for (int i = 0; i < STRETCHES; ++i) {
    const uint32_t places = lane.place_step * a[i] + lane.first_place;
    RPG_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int source = 16 + 8 * i + 4 * half + quarter;
      const uint32_t w = shuffle(word, source), times = shuffle(odd, source);
      const uint32_t r = ((c * times + w) & 7) ^ (w >> 27);
      const uint32_t place = half ? places >> 16 : places & 0xFFFF;
      visit(Row{kStretch * (number + i) + 32 * half, static_cast<int>(r), place,
                stretch[i].signs[half] << r},
            stretch[i]);
    }
  }
}

// Calls visit(row, stretch) for every row of a tile that reads windows, each by one lane.
template <bool PLAIN, class Visit>
RPG_FUNCTION void visit_rows(const Layer& layer, const Tile& tile, const ColumnReads& column,
                             const EntryLane& lane, const Visit& visit) {
  const WindowBand& law = layer.law;
  const int stretches = tile.rows / kStretch, warp = thread() / kWarp;
  if (PLAIN) return visit_lap<2, true>(law, lane, column, 2 * warp, visit);
  const bool pairs = stretches > 1 && !((law.scramble.window | law.offset) & kStretch);
  if (pairs) {  // two stretches of one lap at a time
    RPG_LOOP
    for (int i = 2 * warp; i < stretches; i += 2 * kWarps) {
      visit_lap<2, false>(law, lane, column, i, visit);
    }
  } else {
    RPG_LOOP
    for (int i = warp; i < stretches; i += kWarps) visit_lap<1, false>(law, lane, column, i, visit);
  }
}

// Writes the entries of all rows of a tile of windows, as tile.h has them; they are visible after a
// barrier.
template <bool PLAIN>
RPG_FUNCTION void window_entries(const Layer& layer, const Tile& tile, const ColumnReads& column,
                                 const EntryLane& lane, const Shared<uint32_t>& entry) {
  visit_rows<PLAIN>(layer, tile, column, lane, [&](const Row& row, const Stretch& stretch) {
    entry.tail_at_byte(4 * row.first)[row.offset] =
        row.place | stretch.entry | (row.sign & 0x80000000u);
  });
}

// Writes the entries of all rows of any other tile.
template <Entries ENTRIES>
RPG_FUNCTION void row_entries(const Layer& layer, const Tile& tile, int b, const Stage& stage,
                              const Shared<uint32_t>& entry) {
  RPG_LOOP
  for (int i = thread(); i < tile.rows; i += kThreads) {
    uint32_t place = i, sign;
    if (tile.fill == Fill::kGather) {
      sign = stage.entries[i] & 0x80000000u;
    } else {
      const uint32_t p = position(layer, tile.row + i, b);
      place = ring_slot(layer, p), sign = block_sign(layer, p);
    }
    if (ENTRIES == Entries::kSpread) place = spread_place(place, i / 8);
    entry[i] = place | sign;
  }
}

}  // namespace rpg::RPG_DEVICE
