// What columns of a tile read from windows, found once for many lanes.
//
// A tile that reads windows lies in one strip of the window law, so rows of a column have
// consecutive numbers. It begins and ends at multiples of 64, as do laps: 64 rows, a chunk, read one
// lap of one window. A thread for each chunk evaluates the law of units, for kAhead columns at once;
// after that the window's base, the chunk's address and its signs are read from shared memory.

#pragma once

#include "tile.h"

namespace rpg::RPG_DEVICE {

constexpr int kChunk = 64;
constexpr int kMaxChunks = 1024 / kChunk;
constexpr int kAhead = 4;  // columns that are prepared at once
constexpr int kPrepared = 2 * kAhead;

struct alignas(16) Chunk {
  uint32_t address;   // of its first row, counted from that of the first cell
  uint32_t places;    // entry of the window's first slot: place, and lap
  uint32_t signs[2];  // of rows 32 j ...: the first is bit 31
};

// A window of a column: the slot at which it begins, and the first of the tile's laps that read it,
// which end where those of the next begin.
struct Window {
  uint32_t base;
  uint32_t lap;
};

// Of a column; window `kCount` has the number of windows as its base.
constexpr int kCount = kMaxWindows + 1;
struct Column {
  Shared<Chunk> chunks;    // [rows / 64]
  Shared<Window> windows;  // [kCount + 1]
};

constexpr int kColumnBytes = kMaxChunks * 16 + (kCount + 1) * 8;  // a multiple of 16

// The i-th column of a block of threads, whose memory begins at `offset`.
RPG_FUNCTION Column column_of(int offset, int i) {
  const int at = offset + (i & (kPrepared - 1)) * kColumnBytes;
  return {Shared<Chunk>(at, kMaxChunks), Shared<Window>(at + kMaxChunks * 16, kCount + 1)};
}

// One chunk of column b; LAPS: entries are to have the laps.
template <bool LAPS>
RPG_FUNCTION void prepare_chunk(const Layer& layer, const Tile& tile, int b, int i,
                                const Column& to) {
  const WindowBand& law = layer.law;
  const uint32_t log = law.scramble.bits + 3, first = position(tile, b), p = first + kChunk * i;
  const uint32_t part = part_of(law, p), window = part - part_of(law, first);
  const Part unit = part_at(law, part);
  const uint32_t lap = ((p + law.offset) >> log) - ((first + law.offset) >> log);
  Chunk out{p - unit.p + unit.z + law.offset, window << log | (LAPS ? lap << 24 : 0), {}};
  if (layer.reflect == Reflect::kVector) {
    for (int j = 0; j < 2; ++j) {
      out.signs[j] = reversed(hash_word((p >> 5) + j, law.sign_key[0], law.sign_key[1]));
    }
  }
  to.chunks[i] = out;
  if (i == 0 || p == unit.p) to.windows[window] = {window_base(law, unit.z), lap};
  if (kChunk * (i + 1) == tile.rows) {
    to.windows[window + 1] = {0, lap + 1};
    to.windows[kCount] = {window + 1, 0};
  }
}

// Columns b ... b + kAhead - 1, of those before `end`; `first` is the block's first. Visible after a
// barrier.
template <bool LAPS>
RPG_FUNCTION void prepare_columns(const Layer& layer, const Tile& tile, int offset, int first,
                                  int b, int end) {
  const int chunks = tile.rows / kChunk;
  const int ahead = thread() / chunks;
  if (ahead >= kAhead || b + ahead >= end) return;
  prepare_chunk<LAPS>(layer, tile, b + ahead, thread() % chunks, column_of(offset, b + ahead - first));
}

}  // namespace rpg::RPG_DEVICE
