// The way of a CTA through the columns of its tile, which linear.cu and linear_input_grad.cu share.
//
// A tile is some rows of the layer. For each column of blocks a stage in shared memory holds blocks
// of the bank, and each row of the tile reads one of them, its `place` (linear.h, Fill). Stages are
// filled by asynchronous copies while the ones before them are worked on:
//
//   start          once: the units of the first columns, the copies of the first stages
//   next_stage     waits for the stage of a column, and begins the copies of a later one
//   write_entries  which place each row reads, and with which sign
//   (products)     the kernel's own, between barriers
//   look_ahead     what the copies of later columns need
//
// Chunk c (16 bytes) of the block at `place` lies at chunk c ^ (place & 7), so that chunks c of 8
// neighbouring blocks lie in 8 different groups of banks: every 8 rows of an ldmatrix, or 8 threads
// that read 16 bytes each, take one wavefront.
//
// The entry of a row holds three numbers: its place in bits 0 to 23; in windows in bits 24 to 29
// its lap, the use's number among those of the octet of the ring, so that rows of one lap read
// different places; the sign in bit 31. 0x8200002A is place 42, lap 2, negative.

#pragma once

#include "cuda/device.h"
#include "cuda/linear.h"

namespace rpg::RPG_DEVICE {

constexpr int kWarps = kThreads / kWarp;
constexpr int kColumnsAhead = kThreads / kShuffleRounds;  // columns whose units are found at once
constexpr int kColumnsKept = 2 * kColumnsAhead;           // columns whose units are remembered

// The position, in the order of its law, of row n and column b.
RPG_FUNCTION uint32_t position(const Layer& layer, int n, int b) {
  const uint32_t row = static_cast<uint32_t>(n), column = static_cast<uint32_t>(b);
  if (layer.units) return column * layer.unit.octets * 8 + row;
  return row * static_cast<uint32_t>(layer.blocks) + column;
}

// Sign word w of position p's block, by the layer's law.
RPG_FUNCTION uint32_t sign_word(const Layer& layer, int w, uint32_t p) {
  const uint32_t q[1] = {p};
  uint32_t word[1];
  layer.units ? sign_words_of(layer.unit, w, q, word) : sign_words_of(layer.ring, w, q, word);
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
  layer.units ? slots_of(layer.unit, q) : slots_of(layer.ring, q);
  return q[0];
}

RPG_FUNCTION int place_of(uint32_t entry) { return static_cast<int>(entry & 0xFFFFFFu); }
RPG_FUNCTION int lap_of(uint32_t entry) { return static_cast<int>(entry >> 24 & 63); }
// The sign of an entry, 1 or -1.
RPG_FUNCTION float sign_of(uint32_t entry) { return as_float(0x3F800000u | (entry & 0x80000000u)); }

// The chunk of a stage at which chunk c of a block lies: two blocks of 64 bytes share 128 bytes, so
// place / 2 counts, and of 16 chunks only the lower 3 bits of the number are exchanged.
RPG_FUNCTION int chunk_at(int place, int c, int chunks) {
  return place * chunks + (c ^ (chunks == 4 ? place >> 1 & 3 : place & 7));
}

// What all rows of a unit share: found once, for 16 columns ahead.
struct alignas(16) ColumnUnit {
  uint32_t round[kShuffleRounds];  // Of its shuffle, as law/unit.h has them.
  uint32_t base;                   // The slot at which its window begins.
  uint32_t used;                   // So many uses of the window's first octet are other units'.
  uint32_t places;                 // The window has so many slots.
};

// Where the stages of a CTA are in shared memory, from byte 0 on. It is found on the host; sizes
// are bytes.
struct StageLayout {
  int depth;       // The columns in flight, 3 also for a ring, whose blocks need one stage.
  int log_chunks;  // The binary logarithm of a block's chunks of 16 bytes.
  int row_bytes;   // The bytes of a block.
  int stage;       // The bytes from the blocks of a stage to those of the next; 0 for a ring.
  int units;       // The units of columns begin here, in a tiling of windows.
  int entries;     // The slots and signs of stage 0 begin here, in a gathered tiling.
  int entry_step;  // The bytes from there to those of stage 1.
  int end;         // The first byte behind all of it.
};

RPG_HOST StageLayout stage_layout(const Tiling& tiling, int row_bytes) {
  StageLayout out{};
  out.depth = tiling.stages == 1 ? kStages : tiling.stages;
  out.log_chunks = row_bytes == 256 ? 4 : row_bytes == 128 ? 3 : 2;
  out.row_bytes = row_bytes;
  out.stage = tiling.stages == 1 ? 0 : tiling.places * row_bytes;
  out.units = out.entries = tiling.stages * tiling.places * row_bytes;
  if (tiling.fill == Fill::kWindows) out.entries += kColumnsKept * int{sizeof(ColumnUnit)};
  if (tiling.fill == Fill::kGather) out.entry_step = round_up(4 * tiling.rows, kAlign);
  out.end = out.entries + out.depth * out.entry_step;
  return out;
}

struct Stage {
  Shared<uint4> blocks;      // [places, chunks]
  Shared<uint32_t> entries;  // [rows], slots and signs, in a gathered tiling
  int number;                // of the stage, from 0 on
  int filled;                // The column fills so many places.
};

// A CTA's columns of its tile.
struct Columns {
  const Layer& layer;
  const Tiling& tiling;
  const StageLayout& layout;
  int row, rows;                // The tile: it begins with this row of the layer and has so many.
  uint32_t octet, group, size;  // In windows: it begins with this octet of a unit of this group,
                                // which has so many octets.
  int first, end;               // The CTA's columns.
  Shared<ColumnUnit> units;     // [kColumnsKept], in a tiling of windows
  // What this thread copies of a stage. Its chunks are kThreads chunks apart there: 16, 32 or 64
  // blocks, a multiple of 8, so that they are exchanged in one way.
  const char* source;  // Its chunk of slot 0.
  int place, index;    // The place of its first chunk, and that chunk's number in a stage.
  int unfinished;      // From this column on stages need `finish`.
  int current;         // The number of the next column's stage.
};

// What this CTA goes through, of tile cta_x() and split cta_y(); `ring` [slots, block] is the bank.
RPG_FUNCTION Columns columns_of(const Layer& layer, const Plan& plan, const StageLayout& layout,
                                const void* ring) {
  const int tile = cta_x(), split = cta_y();
  Columns out{layer, plan, layout, 0, 0, 0, 0, 0, 0, 0, {}, nullptr, 0, 0, 0, 0};
  int end = layer.rows;
  out.row = tile * plan.rows;
  if (plan.fill == Fill::kWindows) {
    out.group = static_cast<uint32_t>(tile / plan.parts);
    out.octet = static_cast<uint32_t>(tile % plan.parts * (plan.rows / 8));
    out.size = group_size(layer.unit, out.group);
    const uint32_t first = first_octet(layer.unit, out.group);
    const int group_end = static_cast<int>(8 * (first + out.size));
    out.row = static_cast<int>(8 * (first + out.octet));
    end = group_end < end ? group_end : end;  // The last octet may have fewer than 8 rows.
  }
  const int left = end - out.row;
  out.rows = left < 0 ? 0 : left < plan.rows ? left : plan.rows;
  out.first = static_cast<int>(int64_t{layer.blocks} * split / plan.splits);
  out.end = static_cast<int>(int64_t{layer.blocks} * (split + 1) / plan.splits);
  out.units = Shared<ColumnUnit>(layout.units, plan.fill == Fill::kWindows ? kColumnsKept : 0);
  const int c = thread() & ((1 << layout.log_chunks) - 1);
  out.source = kept(static_cast<const char*>(ring) + 16 * c);
  out.place = kept(thread() >> layout.log_chunks);
  out.index = kept(chunk_at(out.place, c, 1 << layout.log_chunks));
  const bool ragged = layer.columns % layer.block != 0;
  out.unfinished = kept(layer.reflect == Reflect::kElement ? 0 : layer.blocks - ragged);
  return out;
}

// What column b reads; of columns that have been found.
RPG_FUNCTION ColumnUnit& unit_of(const Columns& columns, int b) {
  return *columns.units.span((b - columns.first) & (kColumnsKept - 1), 1);
}

// Finds the units of columns b ... b + 15: 16 threads of a column find a round each, and 16 threads
// the windows. What they write is visible after the next barrier.
RPG_FUNCTION void find_units(const Columns& columns, int b) {
  const UnitBand& law = columns.layer.unit;
  const int column = b + thread() / kShuffleRounds, j = thread() % kShuffleRounds;
  if (column < columns.end) {
    unit_of(columns, column).round[j] =
        round_of(law, column * law.groups + columns.group, columns.size, j);
  }
  if (thread() >= kColumnsAhead || b + thread() >= columns.end) return;
  const UnitWindow window = window_of(law, unit_at(law, b + thread(), columns.group));
  ColumnUnit& unit = unit_of(columns, b + thread());
  unit.base = window.base, unit.used = window.used, unit.places = kOctet * window.octets;
}

// Stage i, for column b.
RPG_FUNCTION Stage stage_at(const Columns& columns, int i, int b) {
  const StageLayout& layout = columns.layout;
  const Fill fill = columns.tiling.fill;
  int filled = fill == Fill::kRing ? static_cast<int>(columns.layer.slots) : columns.rows;
  if (fill == Fill::kWindows) filled = static_cast<int>(unit_of(columns, b).places);
  return {Shared<uint4>(i * layout.stage, columns.tiling.places << layout.log_chunks),
          Shared<uint32_t>(layout.entries + i * layout.entry_step, layout.entry_step / 4), i,
          filled};
}

// Writes which slots, and with which signs, column b of a gathered tile reads; visible after a
// barrier.
RPG_FUNCTION void prepare_rows(const Columns& columns, int b, const Stage& stage) {
  RPG_LOOP
  for (int i = thread(); i < columns.rows; i += kThreads) {
    const uint32_t p = position(columns.layer, columns.row + i, b);
    stage.entries[i] = ring_slot(columns.layer, p) | block_sign(columns.layer, p);
  }
}

// Begins the copies of column b to a stage; of a ring once, for the first column.
RPG_FUNCTION void fill_stage(const Columns& columns, int b, const Stage& stage) {
  constexpr int kTurnBytes = 16 * kThreads;  // bytes that all threads copy at once
  const StageLayout& layout = columns.layout;
  const int step = kThreads >> layout.log_chunks;  // places between a thread's chunks
  int place = columns.place, index = columns.index;
  const auto stored = [&](uint32_t slot) {
    return columns.source + uint64_t{slot} * static_cast<uint32_t>(layout.row_bytes);
  };
  if (columns.tiling.fill == Fill::kGather) {
    RPG_LOOP
    for (; place < columns.rows; place += step, index += kThreads) {
      const uint32_t slot = stage.entries[place] & 0x7FFFFFFFu;
      copy_async<0>(stage.blocks.span(index, 1), stored(slot));
    }
    return;
  }
  // A window of slots, which may go around the end of the ring once: it has no more than the ring.
  const bool windows = columns.tiling.fill == Fill::kWindows;
  if (!windows && b > columns.first) return;
  const uint32_t base = windows ? unit_of(columns, b).base : 0;
  const char* source = stored(base + place);
  if (base + stage.filled <= columns.layer.slots) {
    RPG_LOOP
    for (; place + 3 * step < stage.filled; place += 4 * step, source += 4 * kTurnBytes) {
      uint4* const target = stage.blocks.span(index, 3 * kThreads + 1);
      copy_async<0>(target, source);
      copy_async<kTurnBytes>(target, source);
      copy_async<2 * kTurnBytes>(target, source);
      copy_async<3 * kTurnBytes>(target, source);
      index += 4 * kThreads;
    }
  }
  const int64_t ring_bytes = int64_t{columns.layer.slots} * layout.row_bytes;
  RPG_LOOP
  for (; place < stage.filled; place += step, source += kTurnBytes, index += kThreads) {
    const int64_t wrap = base + place < columns.layer.slots ? 0 : ring_bytes;
    copy_async<0>(stage.blocks.span(index, 1), source - wrap);
  }
}

// Begins the copies of column b to stage i, those of the kernel's own too: exactly one group, also
// after the last column, so that next_stage can count groups.
template <class CopyMore>
RPG_FUNCTION void begin_copies(const Columns& columns, int b, int i, const CopyMore& copy_more) {
  if (b < columns.end) {
    fill_stage(columns, b, stage_at(columns, i, b));
    copy_more(b, i);
  }
  commit_copies();
}

// Makes a stage that has arrived what products may read: signs of elements, which belong to the one
// row of a gathered block, and zeros behind the end of a row. What lies there is no weight, and 0
// times it need not be 0.
template <class T>
RPG_FUNCTION void finish(const Columns& columns, int b, const Stage& stage) {
  using Bits = typename T::Bits;
  constexpr int kPerChunk = 16 / sizeof(Bits);
  const Layer& layer = columns.layer;
  const int chunks = 1 << columns.layout.log_chunks, valid = layer.columns - b * layer.block;
  RPG_LOOP
  for (int i = thread(); i < stage.filled * chunks; i += kThreads) {
    const int place = i / chunks, c = i % chunks, first = c * kPerChunk;
    uint32_t word = 0;
    if (layer.reflect == Reflect::kElement) {
      word = sign_word(layer, first / 32, position(layer, columns.row + place, b));
    }
    uint4* const stored = stage.blocks.span(chunk_at(place, c, chunks), 1);
    Bits bits[kPerChunk];
    memcpy(bits, stored, 16);
    for (int e = 0; e < kPerChunk; ++e) {
      if (word >> sign_bit(first + e) & 1) bits[e] ^= T::kSign;
      if (first + e >= valid) bits[e] = 0;
    }
    memcpy(stored, bits, 16);
  }
  sync();
}

// What comes before the first column: `copy_more(b, i)` begins further copies of column b, for
// stage i. There is one barrier in it, behind which what threads wrote before is visible.
template <class CopyMore>
RPG_FUNCTION void start(const Columns& columns, const CopyMore& copy_more) {
  if (columns.tiling.fill == Fill::kWindows) find_units(columns, columns.first);
  const int count = columns.tiling.fill == Fill::kGather ? columns.layout.depth : 0;
  for (int i = 0; i < count && columns.first + i < columns.end; ++i) {
    prepare_rows(columns, columns.first + i, stage_at(columns, i, columns.first + i));
  }
  sync();
  for (int i = 0; i < columns.layout.depth - 1; ++i) {
    begin_copies(columns, columns.first + i, i, copy_more);
  }
}

// Returns the stage of column b once it has arrived, and begins the copies of column b + depth - 1,
// to the stage of column b - 1, which all threads have left. T is the bank's number type.
template <class T, class CopyMore>
RPG_FUNCTION Stage next_stage(Columns& columns, int b, const CopyMore& copy_more) {
  const int depth = columns.layout.depth;
  depth == kStages ? wait_copies<kStages - 2>() : wait_copies<0>();
  sync();
  const int current = columns.current;
  begin_copies(columns, b + depth - 1, (current ? current : depth) - 1, copy_more);
  const Stage stage = stage_at(columns, current, b);
  columns.current = current + 1 < depth ? current + 1 : 0;
  if (b >= columns.unfinished) finish<T>(columns, b, stage);
  return stage;
}

// The index of copy q modulo 4 of a place in S [place / 8][copy][8], at batch 1, so that rows of 4
// neighbouring octets read different banks: the law fixes only the residues of their places.
RPG_FUNCTION int spread_place(int place, int q) {
  return (place & ~7) * 4 + (place & 7) + 8 * (q & 3);
}

// The entries of a tile of windows: a thread makes those of an octet of rows. Its number in the
// unit goes through the rounds of the shuffle; that is the use of the window that the octet takes,
// so use / laps is the octet of the window, and a word of the octet's own says which of its 8 slots
// each row reads.
template <bool SPREAD>
RPG_FUNCTION void write_octets(const Columns& columns, int b, const Shared<uint32_t>& entry) {
  const UnitBand& law = columns.layer.unit;
  const ColumnUnit& unit = unit_of(columns, b);
  RPG_LOOP
  for (int k = thread(); 8 * k < columns.rows; k += kThreads) {
    uint32_t i = columns.octet + k;  // The octet's number in the unit; then that of its use.
    if (law.permute) {
      RPG_UNROLL
      for (int j = 0; j < kShuffleRounds; ++j) i = shuffle_round(i, columns.size, unit.round[j]);
    }
    const uint32_t use = unit.used + i, octet = divide(use, law.by_laps);
    const uint32_t lap = use - octet * law.by_laps.divisor;
    const uint32_t q = b * law.octets + columns.row / 8 + k;  // in the band: units have one tap
    // With the word 0 each row is its own residue.
    const uint32_t word = law.permute ? hash_word(q, law.octet_key[0], law.octet_key[1]) : 0;
    uint32_t signs = 0;  // Bit r is the sign of row r; four octets share a word.
    if (columns.layer.reflect == Reflect::kVector) {
      signs = hash_word(q / 4, law.sign_key[0], law.sign_key[1]) >> (q % 4 * 8);
    }
    // Lanes 4 to 7 of eight begin with the second half, so that the eight write to all banks.
    RPG_UNROLL
    for (int j = 0; j < 2; ++j) {
      const int first = 4 * (k / 4 % 2 ^ j);
      Vector<uint32_t, 4> out;
      RPG_UNROLL
      for (int t = 0; t < 4; ++t) {
        const int r = first + t;
        int place = static_cast<int>(kOctet * octet + residue_of(r, word));
        if (SPREAD) place = spread_place(place, k);
        out.value[t] = place | lap << 24 | (signs >> r & 1) << 31;
      }
      store(entry.span(8 * k + first, 4), out);
    }
  }
}

// Writes the entries of all rows of the tile in column b; visible after a barrier. SPREAD: of a
// place's four copies at batch 1, the one of its row's octet.
template <bool SPREAD>
RPG_FUNCTION void write_entries(const Columns& columns, int b, const Stage& stage,
                                const Shared<uint32_t>& entry) {
  if (columns.tiling.fill == Fill::kWindows) return write_octets<SPREAD>(columns, b, entry);
  RPG_LOOP
  for (int i = thread(); i < columns.rows; i += kThreads) {
    uint32_t place = i, sign;
    if (columns.tiling.fill == Fill::kGather) {
      sign = stage.entries[i] & 0x80000000u;
    } else {
      const uint32_t p = position(columns.layer, columns.row + i, b);
      place = ring_slot(columns.layer, p), sign = block_sign(columns.layer, p);
    }
    if (SPREAD) place = spread_place(place, i / 8);
    entry[i] = place | sign;
  }
}

// Called behind a barrier after the products of column b: finds what the copies of later columns
// need. Every 16 columns those of the 16 columns before are no longer needed.
RPG_FUNCTION void look_ahead(const Columns& columns, int b, const Stage& stage) {
  const int later = b + columns.layout.depth;
  if (columns.tiling.fill == Fill::kWindows) {
    if ((b - columns.first) % kColumnsAhead == 0) find_units(columns, b + kColumnsAhead);
  } else if (columns.tiling.fill == Fill::kGather && later < columns.end) {
    prepare_rows(columns, later, stage);
  }
}

// Whether this CTA comes last of `parts`, and so sees what all wrote; `last` is in shared memory.
RPG_FUNCTION bool is_last(const Shared<int>& last, unsigned* counter, int parts) {
  sync();
  if (thread() == 0) last[0] = arrive(counter, parts);
  sync();
  return last[0];
}

// The sum of `count` numbers that lie `step` apart, in order.
RPG_FUNCTION float sum_of(const float* values, int count, int64_t step) {
  float sum = 0;
  for (int i = 0; i < count; ++i) sum += values[i * step];
  return sum;
}

}  // namespace rpg::RPG_DEVICE
