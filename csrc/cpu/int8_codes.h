// Codes of a window of slots, and their scales.

#pragma once

#include "cpu/bank.h"
#include "cpu/int8_linear.h"
#include "cpu/unit_window.h"

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

constexpr int64_t kCodeRows = 16;  // windows are padded to so many slots, rows of a tile of AMX

inline int64_t padded_rows(int64_t rows) { return (rows + kCodeRows - 1) / kCodeRows * kCodeRows; }

// The bank of int8 as a layer counts it: `slots` blocks of `block` codes.
struct CodeRing {
  Bank bank;
  int64_t slots;
  int block;

  // The row of codes of a slot, counted in blocks; -1 where it is zeros.
  int64_t row_of(int64_t slot) const {
    if (!bank.places) return slot;
    const int32_t place = bank.places[slot >> bank.shift];
    if (static_cast<uint32_t>(place) >= bank.rows) return -1;
    return (int64_t{place} << bank.shift) + (slot & ((int64_t{1} << bank.shift) - 1));
  }
  const int8_t* codes(int64_t row) const {
    return static_cast<const int8_t*>(bank.data) + row * block;
  }
};

// Codes [padded_rows(count), block] of consecutive slots, and their scales, as many.
struct CodeWindow {
  const int8_t* codes;
  const float* scales;
};

// Of `count` slots from `first` on, around the end of the ring: the bank's own where they lie in
// one piece and a block is a slot, otherwise copied into `codes` and `scales`. Behind the last slot
// are codes and scales of no meaning: a tile of AMX has 16 rows, and nothing reads the products of
// those that are too many.
inline CodeWindow window_codes(const CodeRing& ring, int64_t first, int64_t count, int8_t* codes,
                               float* scales) {
  const int64_t padded = padded_rows(count);
  const bool in_order = !ring.bank.places && first + padded <= ring.slots;
  if (in_order && !ring.bank.shift) return {ring.codes(first), ring.bank.scales + first};
  int64_t slot = first;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = ring.row_of(slot);
    scales[i] = row < 0 ? 0.f : ring.bank.scales[row >> ring.bank.shift];
    if (!in_order) {
      int8_t* target = codes + i * ring.block;
      if (row < 0) {
        std::memset(target, 0, ring.block);
      } else {
        std::memcpy(target, ring.codes(row), ring.block);
      }
    }
    if (++slot == ring.slots) slot = 0;
  }
  for (int64_t i = count; i < padded; ++i) scales[i] = 0;
  if (in_order) return {ring.codes(first), scales};
  std::memset(codes + count * ring.block, 0, (padded - count) * ring.block);
  return {codes, scales};
}

// words [block / 4, lanes] of 4 codes, of rows of codes [lanes, block].
inline void turn_words(const int8_t* rows, int64_t block, int64_t lanes, uint32_t* words) {
  const int64_t count = block / 4, squares = lanes % 8 ? 0 : count / 8 * 8;
  for (int64_t k = 0; k < squares; k += 8) {
    for (int64_t m = 0; m < lanes; m += 8) {
      Pairs<8> square[8];
      for (int i = 0; i < 8; ++i) square[i] = load_words<8>(rows + (m + i) * block + 4 * k);
      transpose8(square);
      for (int i = 0; i < 8; ++i) {
        std::memcpy(words + (k + i) * lanes + m, square + i, sizeof square[i]);
      }
    }
  }
  for (int64_t k = squares; k < count; ++k) {
    for (int64_t m = 0; m < lanes; ++m) {
      std::memcpy(words + k * lanes + m, rows + m * block + 4 * k, sizeof *words);
    }
  }
}

// out [block, lanes]: the same codes as floats, for processors that have no products of int8.
inline void turn_codes(const int8_t* rows, int64_t block, int64_t lanes, float* out) {
  for (int64_t k = 0; k < block; ++k) {
    for (int64_t m = 0; m < lanes; ++m) out[k * lanes + m] = rows[m * block + k];
  }
}

}  // namespace
}  // namespace rpg
