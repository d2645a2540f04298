// What columns of a tile read from windows, found once for many lanes.
//
// A tile that reads windows lies in one strip of the window law, so rows of a column have
// consecutive numbers. It begins and ends at multiples of 64, as do laps: 64 rows, a chunk, read
// one lap of one window. Ahead of the columns that are worked on, a thread for each window
// evaluates the law of units, for 8 columns at once, and then a thread for each chunk its address
// and signs, for 4.
//
// A block of threads counts its columns from 0, its first.

#pragma once

#include "tile.h"

namespace rpg::RPG_DEVICE {

constexpr int kChunk = 64;
constexpr int kMaxChunks = 1024 / kChunk;
constexpr int kAhead = 4;  // columns whose chunks are found at once
constexpr int kChunkColumns = 2 * kAhead, kWindowColumns = 4 * kAhead;  // that are remembered

// What entries of rows are: places, places and laps, or indices of S at batch 1, where each place
// has four copies, 8 by 8 places: on different banks for rows of four neighbouring octets, of which
// the law fixes no more than the residues of places modulo 8.
enum class Entries { kPlaces, kLaps, kSpread };

// Index of copy q modulo 4 of a place.
RPG_FUNCTION int spread_place(int place, int q) {
  return (place & ~7) * 4 + (place & 7) + 8 * (q & 3);
}

struct alignas(16) Chunk {
  uint32_t address;   // of its first row, counted from that of the first cell
  uint32_t places;    // entry of the window's first slot
  uint32_t signs[2];  // of rows 32 j ...: the first is bit 31
};

// A window of a column.
struct alignas(16) Window {
  uint32_t base;   // slot at which it begins
  uint32_t shift;  // (p + shift) mod 2^32 is the address of position p
  uint32_t lap;    // the first of the tile's laps that read it, up to that of the next window
  uint32_t count;  // of the first: windows of the column
};

struct ColumnReads {
  Shared<Window> windows;  // [windows of a column, at most, and one]
  Shared<Chunk> chunks;    // [kMaxChunks]
};

// Where they are in shared memory, found on the host.
struct Columns {
  int log_lanes;      // threads for the windows of a column: 2^log_lanes, at least as many
  int windows, each;  // bytes: those of column 0, and from one column to the next
  int chunks;         // those of column 0
};

constexpr int kChunkBytes = kMaxChunks * 16;

RPG_HOST Columns columns_of(int most_windows, int at) {
  Columns out{0, at, (most_windows + 1) * 16, 0};
  while (1 << out.log_lanes < most_windows) ++out.log_lanes;
  out.chunks = at + kWindowColumns * out.each;
  return out;
}

// First byte behind them.
RPG_HOST int end_of(const Columns& columns) { return columns.chunks + kChunkColumns * kChunkBytes; }

// Column i of a block of threads.
RPG_FUNCTION ColumnReads column_of(const Columns& columns, int i) {
  const int windows = kept(columns.windows + (i & (kWindowColumns - 1)) * columns.each);
  const int chunks = kept(columns.chunks + (i & (kChunkColumns - 1)) * kChunkBytes);
  return {Shared<Window>(windows, columns.each / 16), Shared<Chunk>(chunks, kMaxChunks)};
}

// A block's columns: from `first` to `end` of the layer.
struct Range {
  int first, end;
};

// Windows of columns i ... i + 7.
RPG_FUNCTION void prepare_windows(const Layer& layer, const Tile& tile, const Columns& columns,
                                  const Range& range, int i) {
  const WindowBand& law = layer.law;
  const uint32_t log = law.scramble.bits + 3;
  const int ahead = thread() >> columns.log_lanes, b = range.first + i + ahead;
  const uint32_t window = thread() & ((1 << columns.log_lanes) - 1);
  if (ahead >= 2 * kAhead || b >= range.end) return;
  const uint32_t p = position(tile, b), part = part_of(law, p);
  const uint32_t count = part_of(law, p + tile.rows - 1) - part + 1, zero = (p + law.offset) >> log;
  const Shared<Window> to = column_of(columns, i + ahead).windows;
  if (window == 0) to[count] = {0, 0, ((p + tile.rows - 1 + law.offset) >> log) - zero + 1, 0};
  if (window >= count) return;
  const Part unit = part_at(law, part + window);
  const uint32_t lap = window ? ((unit.p + law.offset) >> log) - zero : 0;
  to[window] = {window_base(law, unit.z), unit.z - unit.p + law.offset, lap, count};
}

// Chunks of columns i ... i + 3, whose windows are there.
template <Entries ENTRIES>
RPG_FUNCTION void prepare_chunks(const Layer& layer, const Tile& tile, const Columns& columns,
                                 const Range& range, int i) {
  const WindowBand& law = layer.law;
  const uint32_t log = law.scramble.bits + 3;
  const int column = i + thread() / kMaxChunks, chunk = thread() % kMaxChunks;
  const int b = range.first + column;
  if (thread() >= kAhead * kMaxChunks || b >= range.end || chunk * kChunk >= tile.rows) return;
  const ColumnReads to = column_of(columns, column);
  const uint32_t first = position(tile, b), p = first + kChunk * chunk;
  const uint32_t window = part_of(law, p) - part_of(law, first);
  Chunk out{p + to.windows[window].shift, window << log, {}};
  if (ENTRIES == Entries::kSpread) out.places *= 4;
  if (ENTRIES == Entries::kLaps)
    out.places |= (((p + law.offset) >> log) - ((first + law.offset) >> log)) << 24;
  if (layer.reflect == Reflect::kVector) {
    for (int j = 0; j < 2; ++j) {
      out.signs[j] = reversed(hash_word((p >> 5) + j, law.sign_key[0], law.sign_key[1]));
    }
  }
  to.chunks[chunk] = out;
}

// Before the loop over columns; ends with a barrier.
template <Entries ENTRIES>
RPG_FUNCTION void prepare_first(const Layer& layer, const Tile& tile, const Columns& columns,
                                const Range& range) {
  prepare_windows(layer, tile, columns, range, 0);
  sync();
  prepare_chunks<ENTRIES>(layer, tile, columns, range, 0);
  sync();
}

// Behind a barrier of column i, what columns from i + 4 on will need; visible after the next one.
template <Entries ENTRIES>
RPG_FUNCTION void prepare_next(const Layer& layer, const Tile& tile, const Columns& columns,
                               const Range& range, int i) {
  if ((i & 3) == 0) prepare_chunks<ENTRIES>(layer, tile, columns, range, i + 4);
  if ((i & 7) == 2) prepare_windows(layer, tile, columns, range, i + 6);
}

}  // namespace rpg::RPG_DEVICE
