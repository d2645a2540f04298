// Tiles of Ŵ, gathered as fp32 with their signs: some rows, and of each some blocks side by side.
// The kernels that read them multiply by product.h, whatever the law is.
//
// Gathering a block: an entry, of slot and sign, is evaluated with those of 64 positions at once,
// and `block` elements are copied; both are used for all rows of the batch that the tile meets.

#pragma once

#include <algorithm>

#include "cpu/bank.h"
#include "cpu/region.h"

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

// Of a tile, at most: rows, which the rows of a product divide, and elements of a row. With fp32 it
// takes 153 KB of the second cache.
constexpr int64_t kTileRows = 144;
constexpr int64_t kTileColumns = 256;
// Behind each row of a tile, so that its rows are in different sets of the first cache.
constexpr int64_t kPitch = 16;

struct WeightTile {
  int64_t row, rows;
  int64_t block, blocks;
  int64_t pitch(int granularity) const { return blocks * granularity + kPitch; }
};

// `count` things dealt to `parts` parts as evenly as possible: where part number `part` begins.
inline int64_t deal(int64_t count, int64_t parts, int64_t part) {
  return count / parts * part + std::min(count % parts, part);
}

// How many parts of at most `largest` things `count` are cut into: a multiple of `threads` parts
// where there are as many things.
inline int64_t parts_of(int64_t count, int64_t largest, int64_t threads) {
  const int64_t parts = (count + largest - 1) / largest;
  return std::min(count, (parts + threads - 1) / threads * threads);
}

// Blocks of a tile, at most.
inline int64_t most_blocks(const LayerLaw& law) {
  return std::min(law.blocks, std::max<int64_t>(kTileColumns / law.granularity, 1));
}

// entry [rows, blocks] = slot | sign << 31 of the positions of a tile.
inline void read_entries(const LayerLaw& law, const WeightTile& tile, uint32_t* entry) {
  constexpr int kLanes = 64;
  const Region region{tile.row, tile.rows, nullptr, 1, law.blocks, tile.block, tile.blocks};
  Cursor cursor(law, region, 0);
  const int64_t positions = positions_of(region);
  for (int64_t done = 0; done < positions;) {
    uint32_t p[kLanes], slot[kLanes], word[kLanes] = {};
    const int size = cursor.next(positions - done, p, slot);
    if (law.reflect == Reflect::kVector) cursor.sign_words(0, p, word);
    for (int l = 0; l < size; ++l) entry[done + l] = slot[l] | (word[l] & 0x80000000u);
    done += size;
  }
}

inline uint32_t slot_of(uint32_t entry) { return entry & 0x7FFFFFFFu; }
inline uint32_t sign_of(uint32_t entry) { return entry & 0x80000000u; }

// out [rows, pitch]: the blocks of a tile, from its entries. PLAIN: of a plain bank.
template <bool PLAIN>
inline void gather_blocks(const Ring& ring, const WeightTile& tile, const uint32_t* entry,
                          float* out) {
  constexpr int64_t kAhead = 8;  // blocks that are asked for before they are read
  const int64_t positions = tile.rows * tile.blocks, row_bytes = ring.row_bytes();
  const int64_t gap = tile.pitch(ring.block) - tile.blocks * ring.block;
  int64_t i = 0;
  for (int64_t r = 0; r < tile.rows; ++r, out += gap) {
    for (int64_t b = 0; b < tile.blocks; ++b, ++i, out += ring.block) {
      const int64_t next = slot_of(entry[std::min(i + kAhead, positions - 1)]);
      if (PLAIN || ring.has(next)) {
        const char* soon = PLAIN ? ring.slot(next) : ring.find(next);
        for (int64_t byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch(soon + byte);
      }
      if (PLAIN) {
        copy_slot(ring, slot_of(entry[i]), sign_of(entry[i]), out);
      } else {
        copy_stored_slot(ring, slot_of(entry[i]), sign_of(entry[i]), out);
      }
    }
  }
}

inline void gather(const Ring& ring, const WeightTile& tile, const uint32_t* entry, float* out) {
  if (ring.plain()) return gather_blocks<true>(ring, tile, entry, out);
  gather_blocks<false>(ring, tile, entry, out);
}

}  // namespace
}  // namespace rpg
