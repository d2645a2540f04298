// Stages: blocks of the bank in shared memory, filled by asynchronous copies while the stage before
// is worked on.
//
// Block `place` begins at byte place · row_bytes; its chunks of 16 bytes are exchanged so that 8
// neighbouring blocks' chunks of one number lie in 8 different groups of banks (ldmatrix, and
// 16-byte reads by neighbouring threads, in one wavefront). With each stage goes a tile of x (or of
// nothing), and what says which blocks are in it.

#pragma once

#include "../cpu/number.h"
#include "tile.h"

namespace rpg::RPG_DEVICE {

// Where chunk c of a block is: blocks of 64 bytes share lines of 128 by two.
RPG_FUNCTION int chunk_at(int place, int c, int chunks) {
  return place * chunks + (c ^ (chunks == 4 ? place >> 1 & 3 : place & 7));
}

struct Bank {
  const void* ring;  // [slots, block] of the bank's dtype, aligned to 16 bytes
  uint32_t slots;
  int row_bytes;  // of a block
};

struct Stage {
  Shared<uint4> blocks;      // [places, chunks]
  Shared<Segment> segments;  // [kMaxSegments], for kWindows
  Shared<uint32_t> entries;  // [places], for kGather: slot and sign
};

// Where a block's stages are in shared memory; `end` is the first byte behind them.
struct StageBytes {
  int segments, entries, end;
};

RPG_LAW StageBytes stage_bytes(const Tiling& tiling, int row_bytes) {
  StageBytes out{};
  out.segments = tiling.stages * tiling.places * row_bytes;
  out.entries = out.segments + kStages * kMaxSegments * static_cast<int>(sizeof(Segment));
  out.end = out.entries + kStages * 4 * ((tiling.rest + 3) / 4 * 4);
  return out;
}

// Stage of the i-th column of a block.
RPG_FUNCTION Stage stage_of(const Tiling& tiling, int row_bytes, int i) {
  const StageBytes at = stage_bytes(tiling, row_bytes);
  const int bytes = tiling.places * row_bytes;
  return {
      Shared<uint4>(tiling.stages == 1 ? 0 : i % kStages * bytes, bytes / 16),
      Shared<Segment>(at.segments + i % kStages * kMaxSegments * 8, kMaxSegments),
      Shared<uint32_t>(at.entries + i % kStages * 4 * ((tiling.rest + 3) / 4 * 4), tiling.rest)};
}

// Says what column b's stage is to hold. Threads share the work; visible after a barrier.
RPG_FUNCTION void prepare(const Layer& layer, const Tile& tile, int b, const Stage& stage) {
  if (tile.fill == Fill::kRing) return;
  if (tile.fill == Fill::kGather) {
    RPG_LOOP
    for (int i = thread(); i < tile.rows; i += kThreads) {
      const uint32_t p = position(layer, tile.row + i, b);
      stage.entries[i] = ring_slot(layer, p) | block_sign(layer, p);
    }
    return;
  }
  const uint32_t p = position(tile, b);
  if (thread() < segments_of(layer.law, p, tile.rows)) {
    stage.segments[thread()] = segment_of(layer.law, part_of(layer.law, p) + thread());
  }
}

// Places that column b's stage holds.
RPG_FUNCTION int places_of(const Layer& layer, const Bank& bank, const Tile& tile, int b) {
  if (tile.fill == Fill::kRing) return static_cast<int>(bank.slots);
  if (tile.fill == Fill::kGather) return tile.rows;
  const int segments = segments_of(layer.law, position(tile, b), tile.rows);
  return segments * static_cast<int>(layer.law.scramble.window);
}

// Begins the copies of the windows that were prepared for column b. A thread takes every
// kThreads / chunks -th block, a multiple of 8, so that its chunks are exchanged in one way.
RPG_FUNCTION void fill_windows(const Layer& layer, const Bank& bank, const Tile& tile, int b,
                               const Stage& stage, int log_chunks) {
  const int chunks = 1 << log_chunks, window = static_cast<int>(layer.law.scramble.window);
  const int first = thread() >> log_chunks, c = thread() & (chunks - 1);
  const char* const ring = static_cast<const char*>(bank.ring) + 16 * c;
  const int segments = segments_of(layer.law, position(tile, b), tile.rows);
  RPG_LOOP
  for (int segment = 0; segment < segments; ++segment) {
    const uint32_t base = stage.segments[segment].base;
    int to = chunk_at(segment * window + first, c, chunks);
    RPG_LOOP
    for (int j = first; j < window; j += kThreads >> log_chunks, to += kThreads) {
      const uint32_t slot = add_mod(base, j, bank.slots);
      copy_async(stage.blocks.at(to, 1), ring + int64_t{slot} * bank.row_bytes, true);
    }
  }
}

// Begins the copies of what was prepared for column b.
RPG_FUNCTION void fill(const Layer& layer, const Bank& bank, const Tile& tile, int b,
                       const Stage& stage) {
  const int log_chunks = bank.row_bytes == 256 ? 4 : bank.row_bytes == 128 ? 3 : 2;
  if (tile.fill == Fill::kWindows) {
    return fill_windows(layer, bank, tile, b, stage, log_chunks);
  }
  const int chunks = bank.row_bytes / 16, places = places_of(layer, bank, tile, b);
  RPG_LOOP
  for (int i = thread(); i < places << log_chunks; i += kThreads) {
    const int place = i >> log_chunks, c = i & (chunks - 1);
    uint32_t slot = place;
    if (tile.fill == Fill::kGather) slot = stage.entries[place] & 0x7FFFFFFFu;
    const char* from =
        static_cast<const char*>(bank.ring) + int64_t{slot} * bank.row_bytes + 16 * c;
    copy_async(stage.blocks.at(chunk_at(place, c, chunks), 1), from, true);
  }
}

// Signs of elements, for a gathered stage: each block belongs to one row.
template <class T>
RPG_FUNCTION void reflect_elements(const Layer& layer, const Tile& tile, int b,
                                   const Stage& stage) {
  const int per_chunk = 16 / sizeof(typename T::Bits), chunks = layer.block / per_chunk;
  RPG_LOOP
  for (int i = thread(); i < tile.rows * chunks; i += kThreads) {
    const int place = i / chunks, c = i - place * chunks;
    const uint32_t p[1] = {position(layer, tile.row + place, b)};
    const int first = c * per_chunk;
    uint32_t word[1];
    if (layer.windows) {
      sign_words_of(layer.law, first / 32, p, word);
    } else {
      sign_words_of(static_cast<const BandLaw&>(layer.law), first / 32, p, word);
    }
    typename T::Bits bits[16 / sizeof(typename T::Bits)];
    uint4* const at = stage.blocks.at(chunk_at(place, c, chunks), 1);
    memcpy(bits, at, 16);
    for (int e = 0; e < per_chunk; ++e) {
      if (word[0] >> sign_bit(first + e) & 1) bits[e] ^= T::kSign;
    }
    memcpy(at, bits, 16);
  }
}

// Elements behind the end of the row are no weights, and 0 times what they hold need not be 0.
template <class T>
RPG_FUNCTION void clear_padding(int places, int valid, int block, const Stage& stage) {
  const int per_chunk = 16 / sizeof(typename T::Bits), chunks = block / per_chunk;
  RPG_LOOP
  for (int place = thread(); place < places; place += kThreads) {
    for (int e = valid; e < block; ++e) {
      uint4* const at = stage.blocks.at(chunk_at(place, e / per_chunk, chunks), 1);
      reinterpret_cast<typename T::Bits*>(at)[e % per_chunk] = 0;
    }
  }
}

// Makes a stage that has arrived what products may read. All threads; with a barrier where needed.
template <class T>
RPG_FUNCTION void finish(const Layer& layer, const Bank& bank, const Tile& tile, int b,
                         const Stage& stage) {
  const int valid = layer.columns - b * layer.block;
  if (layer.reflect == Reflect::kElement) {
    reflect_elements<T>(layer, tile, b, stage);
    sync();
  }
  if (valid < layer.block) {
    clear_padding<T>(places_of(layer, bank, tile, b), valid, layer.block, stage);
    sync();
  }
}

}  // namespace rpg::RPG_DEVICE
