// Entries of a tile's rows: which place of the stage each reads, and with which sign.
//
// In windows they are made class by class, as csrc/cpu/unit_table.h does it: the places 8 A + c of
// a lap come from octet o and residue c alone, so a lane keeps one c and the keys of its rounds (14
// registers), A stays in the upper bits of 32, where a product drops what is above by itself, and a
// round is 3 instructions. The row that reads the place follows from c and the octet's word. Words
// of 16 octets and of 4 times 32 signs are computed by different lanes and exchanged.
//
// Budget of a run of 128 rows of one lap, a warp's share of 1024, for each lane: 25 to find it, 50
// for keys, 22 for words, and 4 places of 22 + 3 rounds: 64 instructions for a row, 1.0 for a
// weight of blocks of 64.

#pragma once

#include "stage.h"

namespace rpg::RPG_DEVICE {

constexpr int kRun = 128;  // rows of one lap that a warp takes at a time, at most

// Rows row ... row + count - 1 of a tile, which one lap of a window reads: address and number of
// the first; all multiples of 8. Entries go to entry[row ...] without an order among lanes.
RPG_FUNCTION void write_run(const Layer& layer, uint32_t segment, uint32_t address, uint32_t p,
                            uint32_t lap_bits, int row, int count, const Shared<uint32_t>& entry) {
  const WindowBand& law = layer.law;
  const Scramble& s = law.scramble;
  const uint32_t lane = thread() % kWarp, c = lane & 7, up = 32 - s.bits;
  const uint32_t upper = ~uint32_t{0} << up, lap = law.lap + (address >> (s.bits + 3));
  const uint32_t octet = (address & (s.window - 1)) >> 3;
  const uint32_t f = hash_word(8 * lap + c, s.key[2], s.key[3]);
  const uint32_t g = hash_word(8 * lap + c, s.key[4], s.key[5]);
  uint32_t factor[kMaxRounds], summand[kMaxRounds];
  RPG_UNROLL
  for (uint32_t r = 0; r < kMaxRounds; ++r) {
    factor[r] = (f >> (4 * r)) | 1;
    summand[r] = (g >> (4 * r)) << up;
  }
  const uint32_t words = hash_word((lap << s.bits) + octet + (lane & 15), s.key[0], s.key[1]);
  const bool vector = layer.reflect == Reflect::kVector;
  const uint32_t signs =
      vector ? hash_word((p >> 5) + (lane & 7), law.sign_key[0], law.sign_key[1]) : 0;
  RPG_LOOP
  for (int first = 0; first < count; first += 32) {
    const uint32_t mine = first / 8 + lane / 8;  // octet of the run
    const uint32_t h = shuffle(words, mine);
    uint32_t a = (octet + mine) << up;
    RPG_UNROLL
    for (uint32_t r = 0; r < kMaxRounds; ++r) {
      const uint32_t x = a * factor[r] + summand[r], y = x ^ ((x >> s.shift) & upper);
      a = r < 7 || s.rounds > 7 ? y : a;
    }
    uint32_t place = 8 * (a >> up) + c, r = row_of_residue(c, h);
    if (!law.permute) place = (address & (s.window - 1)) + 8 * mine + c, r = c;
    const uint32_t offset = 8 * mine + r;
    const uint32_t sign = shuffle(signs, ((p & 31) + 8 * mine) >> 5) << (~(p + offset) & 31);
    if (8 * mine < static_cast<uint32_t>(count)) {
      entry[row + offset] = (segment * s.window + place) | lap_bits | (sign & 0x80000000u);
    }
  }
}

// Entries of all rows of a tile, as tile.h has them; visible after a barrier.
RPG_FUNCTION void write_entries(const Layer& layer, const Tile& tile, int b, const Stage& stage,
                                const Shared<uint32_t>& entry) {
  if (tile.fill != Fill::kWindows) {
    RPG_LOOP
    for (int i = thread(); i < tile.rows; i += kThreads) {
      const uint32_t p = position(layer, tile.row + i, b);
      entry[i] = tile.fill == Fill::kGather ? i | (stage.entries[i] & 0x80000000u)
                                            : ring_slot(layer, p) | block_sign(layer, p);
    }
    return;
  }
  // Such a tile lies in one strip, so its positions are consecutive, and it begins and ends, as do
  // windows, at multiples of 64.
  const WindowBand& law = layer.law;
  const uint32_t first = position(tile, b), part = part_of(law, first);
  const uint32_t log = law.scramble.bits + 3;
  const int share = tile.rows > kWarps * 64 ? tile.rows / kWarps : 64;
  const int begin = thread() / kWarp * share;
  const int end = begin + share < tile.rows ? begin + share : tile.rows;
  RPG_LOOP
  for (int row = begin; row < end;) {
    const uint32_t p = first + row, segment = part_of(law, p) - part;
    const uint32_t start = segment ? law.head + (part + segment - 1) * law.cell : first;
    const uint32_t shift = stage.segments[segment].shift, address = p + shift;
    const uint32_t next = (address | (law.scramble.window - 1)) + 1 - address;  // lap
    int count = end - row < kRun ? end - row : kRun;
    if (static_cast<uint32_t>(count) > next) count = static_cast<int>(next);
    const uint32_t lap = (address >> log) - ((start + shift) >> log);
    write_run(layer, segment, address, p, lap << 24, row, count, entry);
    row += count;
  }
}

}  // namespace rpg::RPG_DEVICE
