// The units that a tile reads, one in each column: found ahead, 16 columns at a time.
//
// A tile of windows (tile.h) belongs to one group of rows, so it has one unit in each column of
// blocks. What all rows of a unit share - its window and the rounds of its shuffle - is found once
// for 16 columns, while the columns before them are worked on: 16 threads of a column find a round
// each, and 16 threads the windows. Two times 16 columns are remembered, 80 bytes each.
//
// A CTA counts its columns from 0, its first.

#pragma once

#include "cuda/tile.h"

namespace rpg::RPG_DEVICE {

constexpr int kColumnsAhead = kThreads / kShuffleRounds;  // columns whose units are found at once
constexpr int kColumnsKept = 2 * kColumnsAhead;           // columns whose units are remembered

// What a column reads.
struct alignas(16) ColumnUnit {
  uint32_t round[kShuffleRounds];  // Of its shuffle, as law/unit.h has them.
  uint32_t base;                   // The slot at which its window begins.
  uint32_t used;    // So many uses of the window's first octet are those of other units.
  uint32_t places;  // The window has so many slots.
};

// A CTA's columns: from `first` to `end` of the layer.
struct ColumnRange {
  int first, end;
};

// What column b reads; of columns that `units` has.
RPG_FUNCTION const ColumnUnit& unit_of(const Shared<ColumnUnit>& units, const ColumnRange& range,
                                       int b) {
  return *units.span((b - range.first) & (kColumnsKept - 1), 1);
}

// Finds the units of columns i ... i + 15. All threads call it; what they write is visible after
// the next barrier.
RPG_FUNCTION void find_units(const Layer& layer, const Tile& tile, const ColumnRange& range,
                             const Shared<ColumnUnit>& units, int i) {
  const UnitBand& law = layer.unit;
  const auto unit = [&](int column) { return units.span((i + column) & (kColumnsKept - 1), 1); };
  const int column = thread() / kShuffleRounds, j = thread() % kShuffleRounds;
  const uint32_t b = range.first + i + column;
  if (range.first + i + column < range.end) {
    unit(column)->round[j] = round_of(law, b * law.groups + tile.group, tile.size, j);
  }
  if (thread() >= kColumnsAhead || range.first + i + thread() >= range.end) return;
  ColumnUnit* const out = unit(thread());
  const UnitWindow window = window_of(law, unit_at(law, range.first + i + thread(), tile.group));
  out->base = window.base, out->used = window.used, out->places = kOctet * window.octets;
}

// Called behind a barrier of column b, finds the units of the 16 columns after the next ones when
// their turn has come: those of the 16 columns before b are no longer needed.
RPG_FUNCTION void find_next_units(const Layer& layer, const Tile& tile, const ColumnRange& range,
                                  const Shared<ColumnUnit>& units, int b) {
  const int i = b - range.first;
  if (i % kColumnsAhead == 0) find_units(layer, tile, range, units, i + kColumnsAhead);
}

}  // namespace rpg::RPG_DEVICE
