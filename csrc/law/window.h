// The window law, for host and device: which bank slot, and with which sign, a virtual weight reads
// when units of the virtual matrix draw from windows of the ring. docs/window_law.md is its
// specification, rpg_kernels/law/window.py its definition.
//
//   p    = (n - n mod H) blocks + b H + n mod H      in a band; H rows in the strip that holds n
//   z    = F + P(p)                                  whole units change places; F as 64 bits
//   slot = (z / cell window + scramble(z / window, z mod window)) mod slots
//   sign = a bit of word(p, w), or bit p mod 32 of word(p / 32, 0) for reflect "vector"
//
// The first address F of a band is reduced once, on the host; everything on p and on z - F is
// uint32 arithmetic. Lane functions are as in law/ring.h. Budget of a lone position: P, 33
// instructions for three words, 5 for each of 7 or 8 rounds, about 40 for the rest.
//
// Kernels go from one UnitPiece to the next: consecutive p, with consecutive z, inside one cell, so
// that all of its slots lie in one window. cpu/unit_table.h evaluates them as a whole.

#pragma once

#include "law/scramble.h"

namespace rpg {

constexpr int kWindowLawVersion = 2;
constexpr uint32_t kStrip = 4096;         // most rows of a strip
constexpr uint32_t kMinWindow = 64;       // in blocks, as everything here
constexpr uint32_t kMaxWindow = 1 << 22;  // 2^15 slots of 128 blocks
constexpr uint32_t kMaxLaps = 64;

// What evaluating positions of one band takes. From BandLaw it has `permutation`, here that of
// whole units, and `base`, here the slot at which the window of the band's first cell begins.
struct WindowBand : BandLaw {
  Scramble scramble;
  Divider by_cell, by_laps, by_blocks;
  uint32_t rows, blocks;
  uint32_t positions;  // Q = rows blocks
  uint32_t cell;       // laps window
  uint32_t head;       // positions before the first whole unit
  uint32_t units;      // U, whole ones
  uint32_t offset;     // F mod cell: addresses of its first cell that lie before the band
  uint32_t lap;        // of that cell's first address, modulo 2^32
  bool vector;         // one sign for a block
};

RPG_HOST WindowBand make_window_band(const LayerLaw& law, int64_t band) {
  const int64_t first_row = band * law.rows_per_band;
  const int64_t rows = law.rows - first_row;
  const KeyStream keys = make_keys(law.seed, law.layer, static_cast<uint64_t>(band));
  WindowBand out{};
  out.scramble = make_scramble(law.window, law.seed);
  out.rows = static_cast<uint32_t>(rows < law.rows_per_band ? rows : law.rows_per_band);
  out.blocks = static_cast<uint32_t>(law.blocks);
  out.positions = static_cast<uint32_t>(uint64_t{out.rows} * out.blocks);
  out.cell = law.laps * law.window;
  // Addresses of a model end below 2^63.
  const uint64_t first =
      law.address + static_cast<uint64_t>(first_row) * static_cast<uint64_t>(law.blocks);
  const uint64_t number = first / out.cell;
  out.offset = static_cast<uint32_t>(first % out.cell);
  out.head = min_u32(out.offset ? out.cell - out.offset : 0, out.positions);
  out.units = (out.positions - out.head) / out.cell;
  out.lap = static_cast<uint32_t>(number * law.laps);
  out.base = static_cast<uint32_t>(number % law.slots * law.window % law.slots);
  const uint32_t size = out.units ? out.units : 1;
  out.permutation = make_permutation(size, minor_factor(size), keys);
  out.permute = law.permute;
  out.by_slots = make_divider(law.slots);
  out.by_cell = make_divider(out.cell);
  out.by_laps = make_divider(law.laps);
  out.by_blocks = make_divider(out.blocks);
  out.vector = law.reflect == Reflect::kVector;
  for (int i = 0; i < 2 * kMaxWords; ++i) out.sign_key[i] = key_at(keys, kSignKey + i);
  return out;
}

// How many cells the band has addresses in.
RPG_LAW int64_t cells_of(const WindowBand& law) {
  return (int64_t{law.offset} + law.positions + law.cell - 1) / law.cell;
}

// How many rows the strip has that holds row n of a band of `rows`.
RPG_LAW uint32_t strip_height(uint32_t n, uint32_t rows) {
  uint32_t x = min_u32(n ^ rows, kStrip);  // its highest bit
  x |= x >> 1;
  x |= x >> 2;
  x |= x >> 4;
  x |= x >> 8;
  return x - (x >> 1);
}

// The position p of row n of the band and block b.
RPG_LAW uint32_t order(const WindowBand& law, uint32_t n, uint32_t b) {
  const uint32_t height = strip_height(n, law.rows), row = n & (height - 1);
  return (n - row) * law.blocks + b * height + row;
}

// A piece of a column of blocks: positions p, p + 1 ... that lie below each other in one strip.
struct ColumnPiece {
  uint32_t row;    // of the band
  uint32_t block;  // the number of the column
  uint32_t rows;   // from this one to the end of the strip
};

// The inverse of `order`, and how far the column goes on.
RPG_LAW ColumnPiece column_piece_at(const WindowBand& law, uint32_t p) {
  const uint32_t strips = law.rows & ~(kStrip - 1);
  uint32_t height = kStrip, base;
  if (p < strips * law.blocks) {
    base = divide(p / kStrip, law.by_blocks) * kStrip;
  } else {
    base = strips;
    for (height /= 2; !(law.rows & height) || p >= (base + height) * law.blocks; height /= 2) {
      base += law.rows & height;
    }
  }
  const uint32_t rest = p - base * law.blocks, row = rest & (height - 1);
  return {base + row, rest / height, height - row};
}

// p -> z - F, in place, and back: whole units change places.
template <bool INVERSE, int LANES>
RPG_LAW void change_units(const WindowBand& law, uint32_t (&p)[LANES]) {
  if (!law.permute || !law.units) return;
  const Divider by_cell = law.by_cell;
  const uint32_t head = law.head, units = law.units, cell = law.cell;
  uint32_t unit[LANES], moved[LANES];
  for (int l = 0; l < LANES; ++l) {
    const uint32_t u = divide(p[l] - head, by_cell);  // nonsense before the first whole unit
    unit[l] = p[l] < head ? units : u;
    moved[l] = unit[l] < units ? unit[l] : 0;
  }
  if (INVERSE) {
    unpermute(law.permutation, moved);
  } else {
    permute(law.permutation, moved);
  }
  for (int l = 0; l < LANES; ++l) {
    const uint32_t change = (moved[l] - unit[l]) * cell;
    p[l] += unit[l] < units ? change : 0;
  }
}

template <int LANES>
RPG_LAW void address_of(const WindowBand& law, uint32_t (&p)[LANES]) {
  change_units<false>(law, p);
}

template <int LANES>
RPG_LAW void from_address(const WindowBand& law, uint32_t (&z)[LANES]) {
  change_units<true>(law, z);
}

// The slot at which the window of a lap, counted from the first cell's, begins. Windows before it
// are below 2^31 + 2^28 slots.
RPG_LAW uint32_t base_of_lap(uint32_t lap, const Divider& by_laps, uint32_t window,
                             const Divider& by_slots, uint32_t base) {
  const uint32_t unwrapped = divide(lap, by_laps) * window, slots = by_slots.divisor;
  const uint32_t rest = 2 * modulo(unwrapped / 2, by_slots) + (unwrapped & 1);
  return add_mod(base, min_u32(rest, rest - slots), slots);
}

// The slot at which the window of address z (counted from F) begins.
RPG_LAW uint32_t window_base(const WindowBand& law, uint32_t z) {
  const uint32_t lap = (z + law.offset) >> (law.scramble.bits + 3);
  return base_of_lap(lap, law.by_laps, law.scramble.window, law.by_slots, law.base);
}

// p -> slot, in place.
template <int LANES>
RPG_LAW void slots_of(const WindowBand& law, uint32_t (&p)[LANES]) {
  const Divider by_laps = law.by_laps, by_slots = law.by_slots;
  const uint32_t window = law.scramble.window, log = law.scramble.bits + 3;
  const uint32_t offset = law.offset, first_lap = law.lap, first_base = law.base;
  uint32_t z[LANES], lap[LANES], base[LANES];
  for (int l = 0; l < LANES; ++l) z[l] = p[l];
  address_of(law, z);
  for (int l = 0; l < LANES; ++l) {
    const uint32_t whole = (z[l] + offset) >> log;
    base[l] = base_of_lap(whole, by_laps, window, by_slots, first_base);
    lap[l] = first_lap + whole;
    z[l] = (z[l] + offset) & (window - 1);
  }
  if (law.permute) scramble(law.scramble, lap, z);
  for (int l = 0; l < LANES; ++l) p[l] = add_mod(base[l], z[l], by_slots.divisor);
}

// 32 sign bits of position p; with one sign for a block, bit 31 is that of p.
template <int LANES>
RPG_LAW void sign_words_of(const WindowBand& law, int w, const uint32_t (&p)[LANES],
                           uint32_t (&word)[LANES]) {
  const uint32_t k0 = law.sign_key[2 * w], k1 = law.sign_key[2 * w + 1];
  if (law.vector) {
    for (int l = 0; l < LANES; ++l) word[l] = hash_word(p[l] >> 5, k0, k1) << (~p[l] & 31);
  } else {
    for (int l = 0; l < LANES; ++l) word[l] = hash_word(p[l], k0, k1);
  }
}

// A unit, or what a band has of one: positions p, p + 1 ... have the addresses z, z + 1 ... (from
// F) of one cell.
struct UnitPiece {
  uint32_t p;
  uint32_t z;
  uint32_t count;  // at most a cell; 0: there is none
};

// How many unit pieces a band has: piece 0 finishes the cell that an earlier layer began, pieces 1
// to `units` are whole units, the last is the rest.
RPG_LAW uint32_t unit_pieces_of(const WindowBand& law) { return law.units + 2; }

RPG_LAW UnitPiece unit_piece_at(const WindowBand& law, uint32_t i) {
  if (i == 0) return {0, 0, law.head};
  const uint32_t p = law.head + (i - 1) * law.cell;
  if (i > law.units) return {p, p, law.positions - p};
  uint32_t z[1] = {p};
  address_of(law, z);
  return {p, z[0], law.cell};
}

}  // namespace rpg
