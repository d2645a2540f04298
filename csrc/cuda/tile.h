// A tile of a layer's rows, and which stored blocks its positions read.
//
// A tile is some rows of the layer; a CTA goes through their columns of blocks one after the other.
// For each column a stage in shared memory holds blocks of the bank, and row i of the tile reads
// one of them, its `place`:
//
//   kWindows  the window of the unit that the rows belong to; a tile is a group of the unit law's
//             rows, or an equal part of one, so that it has one unit in each column
//   kRing     the whole bank
//   kGather   the block of row i at place i
//
// The entry of a row is its place, with the sign of the block's use in bit 31. In windows bits 24
// to 29 are the use's number among those of the octet of the ring, its lap: rows of one lap read
// different places.

#pragma once

#include "cuda/device.h"
#include "law/number.h"
#include "law/unit.h"

namespace rpg::RPG_DEVICE {

enum class Fill : int { kWindows = 0, kRing = 1, kGather = 2 };

constexpr int kThreads = 256;  // of a CTA
constexpr int kWarps = kThreads / kWarp;
constexpr int kAlign = 16;      // bytes: arrays in shared memory begin at multiples of it
constexpr int kMmaBlocks = 16;  // that a warp multiplies at once by tensor cores
constexpr int kStages = 3;      // at most; two where three do not fit, a ring needs one

// The layer of a launch: a matrix, in one band.
struct Layer {
  BandLaw ring;     // The law of the band, if it is law 1,
  UnitBand unit;    // or if it is law 3, whose units have one tap here.
  bool units;       // Whether it is law 3.
  uint32_t slots;   // of the ring
  int rows;         // N
  int blocks;       // A row has so many blocks.
  int block;        // A block has so many elements.
  int columns;      // K
  Reflect reflect;  // What has a sign of its own.
};

// How the rows of a layer are cut into tiles.
struct Tiling {
  Fill fill;   // What the stages hold.
  int rows;    // No tile has more rows.
  int parts;   // A group of rows is cut into so many tiles; 1 where tiles are no groups.
  int tiles;   // There are so many of them.
  int places;  // A stage holds so many blocks, a multiple of kMmaBlocks.
  int stages;  // So many stages are in flight.
};

constexpr uint32_t kPlaceMask = 0xFFFFFFu;

RPG_FUNCTION int place_of(uint32_t entry) { return static_cast<int>(entry & kPlaceMask); }
RPG_FUNCTION int lap_of(uint32_t entry) { return static_cast<int>(entry >> 24 & 63); }
// The sign of an entry, 1 or -1.
RPG_FUNCTION float sign_of(uint32_t entry) { return as_float(0x3F800000u | (entry & 0x80000000u)); }

struct Tile {
  int row;  // It begins with this row of the layer,
  int rows;
  // and in a tiling of windows with this octet of a unit of this group, which has so many octets.
  uint32_t octet, group, size;
};

RPG_FUNCTION Tile tile_at(const Layer& layer, const Tiling& tiling, int i) {
  Tile tile{};
  int end = layer.rows;
  if (tiling.fill == Fill::kWindows) {
    const UnitBand& law = layer.unit;
    tile.group = static_cast<uint32_t>(i / tiling.parts);
    tile.octet = static_cast<uint32_t>(i % tiling.parts * (tiling.rows / 8));
    tile.size = group_size(law, tile.group);
    const uint32_t first = first_octet(law, tile.group);
    const int group_end = static_cast<int>(8 * (first + tile.size));
    tile.row = static_cast<int>(8 * (first + tile.octet));
    end = group_end < end ? group_end : end;  // The last octet may have fewer than 8 rows.
  } else {
    tile.row = i * tiling.rows;
  }
  const int left = end - tile.row;
  tile.rows = left < 0 ? 0 : left < tiling.rows ? left : tiling.rows;
  return tile;
}

// The position, in the order of its law, of row n and column b.
RPG_FUNCTION uint32_t position(const Layer& layer, int n, int b) {
  const uint32_t row = static_cast<uint32_t>(n), column = static_cast<uint32_t>(b);
  if (layer.units) return column * layer.unit.octets * 8 + row;
  return row * static_cast<uint32_t>(layer.blocks) + column;
}

// A row and a column.
struct RowAndColumn {
  int n, b;
};

// The inverse of `position`; n may lie in the padding behind the last row.
RPG_FUNCTION RowAndColumn at_position(const Layer& layer, uint32_t p) {
  const uint32_t size = layer.units ? layer.unit.octets * 8 : static_cast<uint32_t>(layer.blocks);
  const int major = static_cast<int>(p / size), minor = static_cast<int>(p % size);
  return layer.units ? RowAndColumn{minor, major} : RowAndColumn{major, minor};
}

// Sign word w of position p's block, by the layer's law.
RPG_FUNCTION uint32_t sign_word(const Layer& layer, int w, uint32_t p) {
  const uint32_t q[1] = {p};
  uint32_t word[1];
  if (layer.units) {
    sign_words_of(layer.unit, w, q, word);
  } else {
    sign_words_of(layer.ring, w, q, word);
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
  if (layer.units) {
    slots_of(layer.unit, q);
  } else {
    slots_of(layer.ring, q);
  }
  return q[0];
}

}  // namespace rpg::RPG_DEVICE
