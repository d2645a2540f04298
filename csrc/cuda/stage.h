// Stages: blocks of the bank in shared memory, filled by asynchronous copies while the stages
// before them are worked on.
//
// Block `place` begins at byte place · row_bytes; its chunks of 16 bytes are exchanged so that 8
// neighbouring blocks' chunks of one number lie in 8 different groups of banks: ldmatrix, and
// 16-byte reads by neighbouring threads, take one wavefront. With each stage goes what says which
// blocks are in it, and in linear.cu a tile of x.

#pragma once

#include "cuda/units.h"
#include "law/number.h"

namespace rpg::RPG_DEVICE {

// The chunk of a stage at which chunk c of a block lies: two blocks of 64 bytes share 128 bytes.
RPG_FUNCTION int chunk_at(int place, int c, int chunks) {
  return place * chunks + (c ^ (chunks == 4 ? place >> 1 & 3 : place & 7));
}

struct Bank {
  const void* ring;  // [slots, block] of the bank's dtype, aligned to 16 bytes
  uint32_t slots;
  int row_bytes;  // A block has so many bytes,
  int64_t bytes;  // the ring so many.
};

RPG_HOST Bank bank_of(const void* ring, uint32_t slots, int row_bytes) {
  return {ring, slots, row_bytes, int64_t{slots} * row_bytes};
}

struct Stage {
  Shared<uint4> blocks;      // [places, chunks]
  Shared<uint32_t> entries;  // [rows], slots and signs, in a gathered tiling
};

// Where a CTA's stages are in shared memory. It is found on the host; sizes are bytes.
struct StageLayout {
  int depth;       // So many columns are in flight, also where blocks, of a ring, need one stage.
  int log_chunks;  // A block has 2^log_chunks chunks of 16 bytes.
  int stage;       // The blocks of a stage begin so much behind those of the stage before it.
  int units;       // The units of columns begin here, in a tiling of windows.
  int entries;     // The entries of stage 0 begin here, in a gathered tiling,
  int entry_step;  // those of each further stage so much later.
  int end;         // The first byte behind all of it.
};

RPG_HOST StageLayout stage_layout(const Tiling& tiling, int row_bytes) {
  StageLayout out{};
  out.depth = tiling.stages == 1 ? kStages : tiling.stages;
  out.log_chunks = row_bytes == 256 ? 4 : row_bytes == 128 ? 3 : 2;
  const int bytes = tiling.places * row_bytes;
  out.stage = tiling.stages == 1 ? 0 : bytes;
  out.units = tiling.stages * bytes;
  out.entries = out.units;
  if (tiling.fill == Fill::kWindows) {
    out.entries += kColumnsKept * static_cast<int>(sizeof(ColumnUnit));
  }
  if (tiling.fill == Fill::kGather) out.entry_step = 4 * ((tiling.rows + 3) / 4 * 4);
  out.end = out.entries + out.depth * out.entry_step;
  return out;
}

// The units of columns, in a tiling of windows.
RPG_FUNCTION Shared<ColumnUnit> units_of(const StageLayout& layout, const Tiling& tiling) {
  return Shared<ColumnUnit>(layout.units, tiling.fill == Fill::kWindows ? kColumnsKept : 0);
}

// Stage i of a CTA.
RPG_FUNCTION Stage stage_of(const StageLayout& layout, const Tiling& tiling, int i) {
  return {Shared<uint4>(i * layout.stage, tiling.places << layout.log_chunks),
          Shared<uint32_t>(layout.entries + i * layout.entry_step, layout.entry_step / 4)};
}

// The number of the stage `steps` after stage i; there are at least as many stages as steps.
RPG_FUNCTION int stage_after(int depth, int i, int steps) {
  return i + steps >= depth ? i + steps - depth : i + steps;
}

// Waits until the copies of the oldest stage that is not yet worked on have arrived.
RPG_FUNCTION void wait_stage(int depth) {
  if (depth == kStages) {
    wait_copies<kStages - 2>();
  } else {
    wait_copies<0>();
  }
}

// Writes which slots, and with which signs, column b of a gathered tile reads. Threads share the
// work; what they wrote is visible after a barrier.
RPG_FUNCTION void prepare_rows(const Layer& layer, const Tile& tile, int b, const Stage& stage) {
  RPG_LOOP
  for (int i = thread(); i < tile.rows; i += kThreads) {
    const uint32_t p = position(layer, tile.row + i, b);
    stage.entries[i] = ring_slot(layer, p) | block_sign(layer, p);
  }
}

// What this thread copies of a stage. Its chunks are kThreads chunks apart in the stage, which is 8
// or more blocks, so that they are exchanged in one way.
struct BankCopies {
  const char* source;  // Its chunk of slot 0.
  int place;           // The place of its first chunk, and its number
  int index;           // in a stage.
};

RPG_FUNCTION BankCopies copies_of(const StageLayout& layout, const Bank& bank) {
  const int first = thread() >> layout.log_chunks, c = thread() & ((1 << layout.log_chunks) - 1);
  const char* ring = static_cast<const char*>(bank.ring);
  return {kept(ring + 16 * c), kept(first), kept(chunk_at(first, c, 1 << layout.log_chunks))};
}

RPG_FUNCTION const char* stored_chunk(const Bank& bank, const BankCopies& copies, uint32_t slot) {
  return copies.source + uint64_t{slot} * static_cast<uint32_t>(bank.row_bytes);
}

constexpr int kTurnBytes = 16 * kThreads;  // bytes that all threads copy at once

// Begins the copies of a unit's window, which may go around the end of the ring once: it has at
// most as many slots as the ring.
RPG_FUNCTION void fill_window(const StageLayout& layout, const Bank& bank, const ColumnUnit& unit,
                              const BankCopies& copies, const Stage& stage) {
  const int step = kThreads >> layout.log_chunks, places = static_cast<int>(unit.places);
  const char* source = stored_chunk(bank, copies, unit.base + copies.place);
  int place = copies.place, index = copies.index;
  if (unit.base + unit.places <= bank.slots) {
    RPG_LOOP
    for (; place + 3 * step < places; place += 4 * step, source += 4 * kTurnBytes) {
      uint4* const target = stage.blocks.span(index, 3 * kThreads + 1);
      copy_async<0>(target, source);
      copy_async<kTurnBytes>(target, source);
      copy_async<2 * kTurnBytes>(target, source);
      copy_async<3 * kTurnBytes>(target, source);
      index += 4 * kThreads;
    }
  }
  RPG_LOOP
  for (; place < places; place += step, source += kTurnBytes, index += kThreads) {
    const int64_t wrap = unit.base + place < bank.slots ? 0 : bank.bytes;
    copy_async<0>(stage.blocks.span(index, 1), source - wrap);
  }
}

// Begins the copies of a gathered column; the block of row i goes to place i.
RPG_FUNCTION void fill_rows(const StageLayout& layout, const Bank& bank, const Tile& tile,
                            const BankCopies& copies, const Stage& stage) {
  const int step = kThreads >> layout.log_chunks;
  const auto stored = [&](int row) {
    return stored_chunk(bank, copies, stage.entries[row] & 0x7FFFFFFFu);
  };
  int row = copies.place, index = copies.index;
  RPG_LOOP
  for (; row + 3 * step < tile.rows; row += 4 * step, index += 4 * kThreads) {
    uint4* const target = stage.blocks.span(index, 3 * kThreads + 1);
    copy_async<0>(target, stored(row));
    copy_async<0>(target + kThreads, stored(row + step));
    copy_async<0>(target + 2 * kThreads, stored(row + 2 * step));
    copy_async<0>(target + 3 * kThreads, stored(row + 3 * step));
  }
  RPG_LOOP
  for (; row < tile.rows; row += step, index += kThreads) {
    copy_async<0>(stage.blocks.span(index, 1), stored(row));
  }
}

// Begins the copies of a whole ring.
RPG_FUNCTION void fill_ring(const StageLayout& layout, const Bank& bank, const Stage& stage) {
  const int log = layout.log_chunks, chunks = 1 << log;
  RPG_LOOP
  for (int i = thread(); i < static_cast<int>(bank.slots) << log; i += kThreads) {
    const int slot = i >> log, c = i & (chunks - 1);
    copy_async<0>(stage.blocks.span(chunk_at(slot, c, chunks), 1),
                  static_cast<const char*>(bank.ring) + int64_t{i} * 16);
  }
}

// Begins the copies of column b to a stage; of a ring once, for the first column of the range.
RPG_FUNCTION void fill_stage(const Tiling& tiling, const StageLayout& layout, const Bank& bank,
                             const Tile& tile, const ColumnRange& range,
                             const Shared<ColumnUnit>& units, const BankCopies& copies, int b,
                             const Stage& stage) {
  if (tiling.fill == Fill::kWindows) {
    fill_window(layout, bank, unit_of(units, range, b), copies, stage);
  } else if (tiling.fill == Fill::kGather) {
    fill_rows(layout, bank, tile, copies, stage);
  } else if (b == range.first) {
    fill_ring(layout, bank, stage);
  }
}

// Applies the signs of elements to a gathered stage, where each block belongs to one row.
template <class T>
RPG_FUNCTION void reflect_elements(const Layer& layer, const Tile& tile, int b,
                                   const Stage& stage) {
  const int per_chunk = 16 / sizeof(typename T::Bits), chunks = layer.block / per_chunk;
  RPG_LOOP
  for (int i = thread(); i < tile.rows * chunks; i += kThreads) {
    const int place = i / chunks, c = i - place * chunks;
    const int first = c * per_chunk;
    const uint32_t p = position(layer, tile.row + place, b);
    const uint32_t word = sign_word(layer, first / 32, p);
    typename T::Bits bits[16 / sizeof(typename T::Bits)];
    uint4* const stored = stage.blocks.span(chunk_at(place, c, chunks), 1);
    memcpy(bits, stored, 16);
    for (int e = 0; e < per_chunk; ++e) {
      if (word >> sign_bit(first + e) & 1) bits[e] ^= T::kSign;
    }
    memcpy(stored, bits, 16);
  }
}

// Clears the elements behind the end of the row: they are no weights, and 0 times what they hold
// need not be 0.
template <class T>
RPG_FUNCTION void clear_padding(int places, int valid, int block, const Stage& stage) {
  const int per_chunk = 16 / sizeof(typename T::Bits), chunks = block / per_chunk;
  RPG_LOOP
  for (int place = thread(); place < places; place += kThreads) {
    for (int e = valid; e < block; ++e) {
      uint4* const stored = stage.blocks.span(chunk_at(place, e / per_chunk, chunks), 1);
      reinterpret_cast<typename T::Bits*>(stored)[e % per_chunk] = 0;
    }
  }
}

// The first column whose stage, once it has arrived, is not yet what products may read: from there
// on each needs `sign_and_clear`.
RPG_FUNCTION int unfinished_from(const Layer& layer) {
  if (layer.reflect == Reflect::kElement) return 0;
  return layer.columns % layer.block ? layer.blocks - 1 : layer.blocks;
}

// Makes a stage that has arrived what products may read. All threads call it; it ends with a
// barrier.
template <class T>
RPG_FUNCTION void sign_and_clear(const Layer& layer, const Tile& tile, int places, int b,
                                 const Stage& stage) {
  if (layer.reflect == Reflect::kElement) reflect_elements<T>(layer, tile, b, stage);
  sync();
  const int valid = layer.columns - b * layer.block;
  if (valid >= layer.block) return;
  clear_padding<T>(places, valid, layer.block, stage);
  sync();
}

}  // namespace rpg::RPG_DEVICE
