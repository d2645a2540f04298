// What columns of a tile read from windows, found once for many lanes.
//
// A tile that reads windows lies in one strip of the window law, so rows of a column have
// consecutive numbers. It begins and ends at multiples of 64, as do laps: 64 rows, a stretch, read
// one lap of one window. Ahead of the columns that are worked on, a thread for each window
// evaluates the law of units, for 8 columns at once, and then a thread for each stretch finds its
// address and signs, for 4 columns at once.
//
// A CTA counts its columns from 0, its first.

#pragma once

#include "cuda/tile.h"

namespace rpg::RPG_DEVICE {

constexpr int kStretch = 64;                    // rows
constexpr int kMaxStretches = 1024 / kStretch;  // of a tile
constexpr int kColumnsAhead = 4;                // columns whose stretches are found at once
// Columns whose stretches, and whose windows, are remembered.
constexpr int kStretchColumns = 2 * kColumnsAhead, kWindowColumns = 4 * kColumnsAhead;

// What the entry of a row has beside the sign.
enum class Entries {
  kPlaces,  // the row's place
  kLaps,    // the place, and in bits 24 to 29 the number of the lap
  kSpread,  // the index of one of the place's four copies in S, at batch 1
};

// The index of copy q modulo 4 of a place. 8 places have their copies behind each other, so that
// rows of four neighbouring octets read different banks: the law fixes no more of their places than
// the residues modulo 8.
RPG_FUNCTION int spread_place(int place, int q) {
  return (place & ~7) * 4 + (place & 7) + 8 * (q & 3);
}

// What 64 rows of a column read.
struct alignas(16) Stretch {
  uint32_t address;   // The address of its first row, counted from that of the first cell.
  uint32_t entry;     // A row that reads the window's first slot has this entry, less its sign.
  uint32_t signs[2];  // Word j has the signs of rows 32 j ...; that of the first is bit 31.
};

// A window that a column reads.
struct alignas(16) ColumnWindow {
  uint32_t base;   // The slot at which it begins.
  uint32_t shift;  // (p + shift) mod 2^32 is the address of position p.
  uint32_t lap;  // The first of the tile's laps that read it; the next window has the first after.
  uint32_t count;  // In a column's first window: how many the column reads.
};

struct ColumnReads {
  Shared<ColumnWindow> windows;  // One more than a column reads at most.
  Shared<Stretch> stretches;     // [kMaxStretches]
};

// Where what columns read is in shared memory. It is found on the host; sizes are bytes.
struct ColumnsLayout {
  int log_lanes;     // A column has 2^log_lanes threads, at least one for each of its windows.
  int windows;       // The windows of column 0 are here,
  int column_bytes;  // those of each further column so much later.
  int stretches;     // The stretches of column 0 are here.
};

constexpr int kStretchBytes = kMaxStretches * 16;

RPG_HOST ColumnsLayout columns_of(int most_windows, int begin) {
  ColumnsLayout out{0, begin, (most_windows + 1) * 16, 0};
  while (1 << out.log_lanes < most_windows) ++out.log_lanes;
  out.stretches = begin + kWindowColumns * out.column_bytes;
  return out;
}

// The first byte behind them.
RPG_HOST int end_of(const ColumnsLayout& columns) {
  return columns.stretches + kStretchColumns * kStretchBytes;
}

// What column i of a CTA reads.
RPG_FUNCTION ColumnReads column_of(const ColumnsLayout& columns, int i) {
  const int windows = kept(columns.windows + (i & (kWindowColumns - 1)) * columns.column_bytes);
  const int stretches = kept(columns.stretches + (i & (kStretchColumns - 1)) * kStretchBytes);
  return {Shared<ColumnWindow>(windows, columns.column_bytes / 16),
          Shared<Stretch>(stretches, kMaxStretches)};
}

// A CTA's columns: from `first` to `end` of the layer.
struct ColumnRange {
  int first, end;
};

// Finds the windows of columns i ... i + 7.
RPG_FUNCTION void prepare_windows(const Layer& layer, const Tile& tile,
                                  const ColumnsLayout& columns, const ColumnRange& range, int i) {
  const WindowBand& law = layer.law;
  const uint32_t log = law.scramble.bits + 3;
  const int ahead = thread() >> columns.log_lanes, b = range.first + i + ahead;
  const uint32_t window = thread() & ((1 << columns.log_lanes) - 1);
  if (ahead >= 2 * kColumnsAhead || b >= range.end) return;
  const uint32_t p = position(tile, b), first_piece = unit_piece_of(law, p);
  const uint32_t count = unit_piece_of(law, p + tile.rows - 1) - first_piece + 1,
                 zero = (p + law.offset) >> log;
  const Shared<ColumnWindow> windows = column_of(columns, i + ahead).windows;
  if (window == 0) windows[count] = {0, 0, ((p + tile.rows - 1 + law.offset) >> log) - zero + 1, 0};
  if (window >= count) return;
  const UnitPiece piece = unit_piece_at(law, first_piece + window);
  const uint32_t lap = window ? ((piece.p + law.offset) >> log) - zero : 0;
  windows[window] = {window_base(law, piece.z), piece.z - piece.p + law.offset, lap, count};
}

// Finds the stretches of columns i ... i + 3, whose windows are known.
template <Entries ENTRIES>
RPG_FUNCTION void prepare_stretches(const Layer& layer, const Tile& tile,
                                    const ColumnsLayout& columns, const ColumnRange& range, int i) {
  const WindowBand& law = layer.law;
  const uint32_t log = law.scramble.bits + 3;
  const int column = i + thread() / kMaxStretches, stretch = thread() % kMaxStretches;
  const int b = range.first + column;
  if (thread() >= kColumnsAhead * kMaxStretches || b >= range.end ||
      stretch * kStretch >= tile.rows)
    return;
  const ColumnReads reads = column_of(columns, column);
  const uint32_t first = position(tile, b), p = first + kStretch * stretch;
  const uint32_t window = unit_piece_of(law, p) - unit_piece_of(law, first);
  Stretch out{p + reads.windows[window].shift, window << log, {}};
  if (ENTRIES == Entries::kSpread) out.entry *= 4;
  if (ENTRIES == Entries::kLaps)
    out.entry |= (((p + law.offset) >> log) - ((first + law.offset) >> log)) << 24;
  if (layer.reflect == Reflect::kVector) {
    for (int j = 0; j < 2; ++j) {
      out.signs[j] = reversed(hash_word((p >> 5) + j, law.sign_key[0], law.sign_key[1]));
    }
  }
  reads.stretches[stretch] = out;
}

// Finds what the first columns read, before the loop over columns; ends with a barrier.
template <Entries ENTRIES>
RPG_FUNCTION void prepare_first(const Layer& layer, const Tile& tile, const ColumnsLayout& columns,
                                const ColumnRange& range) {
  prepare_windows(layer, tile, columns, range, 0);
  sync();
  prepare_stretches<ENTRIES>(layer, tile, columns, range, 0);
  sync();
}

// Called behind a barrier of column i, finds what columns from i + 4 on read; it is visible after
// the next barrier.
template <Entries ENTRIES>
RPG_FUNCTION void prepare_next(const Layer& layer, const Tile& tile, const ColumnsLayout& columns,
                               const ColumnRange& range, int i) {
  if ((i & 3) == 0) prepare_stretches<ENTRIES>(layer, tile, columns, range, i + 4);
  if ((i & 7) == 2) prepare_windows(layer, tile, columns, range, i + 6);
}

}  // namespace rpg::RPG_DEVICE
