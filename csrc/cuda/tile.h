// A tile of a layer's rows, and which stored blocks its positions read.
//
// A tile is some rows of the layer; a CTA goes through their columns of blocks one after the other.
// For each column a stage in shared memory holds blocks of the bank, and row i of the tile reads
// one of them, its `place`:
//
//   kWindows  the windows that the column's rows read, one behind the other; tiles of a power of
//             two of rows, each in one strip of the window law, so that they are few
//   kRing     the whole bank
//   kGather   the block of row i at place i
//
// The entry of a row is its place, with the sign of the block's use in bit 31. Rows of a column
// that read one window in one lap read different places; where asked for, bits 24 to 29 of an entry
// are the number of the lap among the column's.

#pragma once

#include "cuda/device.h"
#include "law/number.h"
#include "law/window.h"

namespace rpg::RPG_DEVICE {

enum class Fill : int { kWindows = 0, kRing = 1, kGather = 2 };

constexpr int kThreads = 256;  // of a CTA
constexpr int kWarps = kThreads / kWarp;
constexpr int kAlign = 16;       // bytes: arrays in shared memory begin at multiples of it
constexpr int kMmaBlocks = 16;   // that a warp multiplies at once by tensor cores
constexpr int kStages = 3;       // at most; two where three do not fit, a ring needs one
constexpr int kMaxWindows = 18;  // of a column of a tile: 1024 rows, cells of 64, and one more

// The layer of a launch.
struct Layer {
  WindowBand law;   // The law of its only band. Of law 1 only what BandLaw has is set.
  bool windows;     // Whether it is law 2.
  int rows;         // N
  int blocks;       // A row has so many blocks.
  int block;        // A block has so many elements.
  int columns;      // K
  Reflect reflect;  // What has a sign of its own.
};

// How the rows of a layer are cut into tiles. They are numbered: first those of `rows` rows with
// `fill`, then those that are gathered, if rows are left.
struct Tiling {
  Fill fill;          // What the stages of the first tiles hold.
  int rows;           // Each of them has so many rows.
  int filled_tiles;   // There are so many of them.
  int gathered_rows;  // Each of the others has so many rows.
  int tiles;          // There are so many tiles of both kinds.
  int places;         // A stage holds so many blocks, a multiple of kMmaBlocks.
  int stages;         // So many stages are in flight.
};

constexpr uint32_t kPlaceMask = 0xFFFFFFu;

RPG_FUNCTION int place_of(uint32_t entry) { return static_cast<int>(entry & kPlaceMask); }
RPG_FUNCTION int lap_of(uint32_t entry) { return static_cast<int>(entry >> 24 & 63); }
// The sign of an entry, 1 or -1.
RPG_FUNCTION float sign_of(uint32_t entry) { return as_float(0x3F800000u | (entry & 0x80000000u)); }

struct Tile {
  Fill fill;
  int row;  // It begins with this row of the layer.
  int rows;
  uint32_t number, step;  // The position of its first row in column b is number + b step.
};

// The position, in the order of its law, of row n and column b.
RPG_FUNCTION uint32_t position(const Layer& layer, int n, int b) {
  if (layer.windows) return order(layer.law, n, b);
  return static_cast<uint32_t>(n) * layer.blocks + b;
}

RPG_FUNCTION Tile tile_at(const Layer& layer, const Tiling& tiling, int i) {
  const bool whole = i < tiling.filled_tiles;
  const int height = whole ? tiling.rows : tiling.gathered_rows, gathered = i - tiling.filled_tiles;
  const int row = whole ? i * height : tiling.filled_tiles * tiling.rows + gathered * height;
  const int left = layer.rows - row;
  const uint32_t number = position(layer, row, 0), step = position(layer, row, 1) - number;
  return {whole ? tiling.fill : Fill::kGather, row, left < height ? left : height, number, step};
}

RPG_FUNCTION uint32_t position(const Tile& tile, int b) { return tile.number + b * tile.step; }

// The number of the unit's piece (law/window.h) that holds p.
RPG_FUNCTION uint32_t unit_piece_of(const WindowBand& law, uint32_t p) {
  const Divider& by_cell = law.by_cell;  // 64 or more
  const uint32_t unit = 1 + (umulhi(p - law.head, by_cell.magic) >> by_cell.shift);
  return p < law.head ? 0 : unit;
}

// Sign word w of position p's block, by the layer's law.
RPG_FUNCTION uint32_t sign_word(const Layer& layer, int w, uint32_t p) {
  const uint32_t q[1] = {p};
  uint32_t word[1];
  if (layer.windows) {
    sign_words_of(layer.law, w, q, word);
  } else {
    sign_words_of(static_cast<const BandLaw&>(layer.law), w, q, word);
  }
  return word[0];
}

// The sign of position p's block in bit 31, where a block has one sign; otherwise 0.
RPG_FUNCTION uint32_t block_sign(const Layer& layer, uint32_t p) {
  if (layer.reflect != Reflect::kVector) return 0;
  return sign_word(layer, 0, p) & 0x80000000u;
}

// The slot that position p reads.
RPG_CALLED uint32_t ring_slot(const Layer& layer, uint32_t p) {
  uint32_t q[1] = {p};
  if (layer.windows) {
    slots_of(layer.law, q);
  } else {
    slots_of(static_cast<const BandLaw&>(layer.law), q);
  }
  return q[0];
}

}  // namespace rpg::RPG_DEVICE
