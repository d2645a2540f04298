// P of a column, for 16-bit numbers: dy of a tile's rows at the slots that the rows read.
//
//   P[lap, slot, m] = ± dy[row, m]      of the row that reads the slot in that lap
//
// A permutation of dy's rows, lap by lap: each goes to one slot of P, with its sign and unrounded,
// without an order among lanes. P: [plane of 8 rows of dy][lap][slot] of 16 bytes, or at batch 1
// [lap][slot] of 2. A tile that reads no windows has one lap, of its rows.

#pragma once

#include "cuda/input_grad.h"

namespace rpg::RPG_DEVICE {

struct InputGradMma {
  Shared<char> p;         // as above
  Shared<char> dy;        // [plane][row] of 16 bytes, or [row] of 2
  Shared<uint32_t> flag;  // [places]: whether a row reads it, or the places of a ring's rows
};

// How many bytes a term of P has, and a row of dy.
template <int BATCH>
constexpr int kSlotBytes = BATCH == 1 ? 2 : 16;

constexpr int kLapPad = 8;  // at batch 1, so that 8 laps are on different banks

RPG_HOST InputGradPlan mma_plan(const Layer& layer, const Tiling& tiling, int row_bytes,
                                int batch_tile) {
  InputGradPlan out{};
  out.layout = stage_layout(layer, tiling, row_bytes);
  const int planes = (batch_tile + 7) / 8, slot_bytes = batch_tile == 1 ? 2 : 16 * planes;
  const int row_terms =
      round_up(tiling.fill == Fill::kRing ? tiling.rows : tiling.gathered_rows, kMmaBlocks);
  out.terms_per_lap = row_terms, out.plane = row_terms;
  if (tiling.fill == Fill::kWindows) {
    const int window = static_cast<int>(layer.law.scramble.window);
    const int laps = tiling.rows / window + (layer.law.offset % window != 0);
    out.terms_per_lap = batch_tile == 1 ? window + kLapPad : window;
    out.plane = laps * out.terms_per_lap > row_terms ? laps * out.terms_per_lap : row_terms;
  }
  out.terms = out.layout.end;
  out.dy_at = out.terms + round_up(out.plane * slot_bytes, kAlign);
  out.entry = out.dy_at + round_up(most_rows(tiling) * slot_bytes, kAlign);
  out.sums = out.entry + 4 * kMaxRows;
  const int parts = kWarps / (row_bytes / 32);
  out.last = out.sums + 4 * parts * batch_tile * kSumPitch;
  out.bytes = out.last + kAlign;
  return out;
}

template <int BATCH>
RPG_FUNCTION InputGradMma mma_shared(const InputGradKernelArgs& args) {
  constexpr int kBytes = (BATCH + 7) / 8 * kSlotBytes<BATCH>;
  return {Shared<char>(args.terms, args.plane * kBytes),
          Shared<char>(args.dy_at, most_rows(args.tiling) * kBytes),
          Shared<uint32_t>(args.entry, kMaxRows)};
}

// dy of the tile into shared memory, zeros behind the batch.
template <class T, int BATCH>
RPG_FUNCTION void load_dy(const InputGradKernelArgs& args, const Tile& tile, int m0,
                          const InputGradMma& memory) {
  using Bits = typename T::Bits;
  constexpr int kVectorRows = BATCH == 1 ? 1 : 8;
  const Bits* const dy = static_cast<const Bits*>(args.dy) + tile.row;
  RPG_LOOP
  for (int i = thread(); i < tile.rows; i += kThreads) {
    RPG_UNROLL
    for (int plane = 0; plane < BATCH / kVectorRows; ++plane) {
      Vector<Bits, kVectorRows> v;
      RPG_UNROLL
      for (int j = 0; j < kVectorRows; ++j) {
        const int m = m0 + kVectorRows * plane + j;
        v.value[j] = m < args.batch ? dy[int64_t{m} * args.layer.rows + i] : Bits{0};
      }
      store(memory.dy.span((plane * most_rows(args.tiling) + i) * kSlotBytes<BATCH>,
                           kSlotBytes<BATCH>),
            v);
    }
  }
}

// Copies dy of a row of the tile to a slot of P, both counted in bytes, with the sign in bit 31
// of `sign`.
template <int BATCH>
RPG_FUNCTION void put(const InputGradKernelArgs& args, const InputGradMma& memory, int row_byte,
                      int target_byte, uint32_t sign) {
  if constexpr (BATCH == 1) {
    const auto v = load<uint16_t>(memory.dy.span(row_byte, 2));
    store(memory.p.span(target_byte, 2), static_cast<uint16_t>(v ^ (sign >> 16 & 0x8000u)));
  } else {
    const uint32_t sign_bits =
        static_cast<uint32_t>(static_cast<int32_t>(sign) >> 31) & 0x80008000u;
    RPG_UNROLL
    for (int plane = 0; plane < BATCH / 8; ++plane) {
      const int row = plane * 16 * most_rows(args.tiling) + row_byte;
      auto v = load<Vector<uint32_t, 4>>(memory.dy.span(row, 16));
      RPG_UNROLL
      for (int j = 0; j < 4; ++j) v.value[j] ^= sign_bits;
      store(memory.p.span(plane * 16 * args.plane + target_byte, 16), v);
    }
  }
}

// Makes zeros of the terms of P from `begin` to `end` - 1, in each plane.
template <int BATCH>
RPG_FUNCTION void clear(const InputGradKernelArgs& args, const InputGradMma& memory, int begin,
                        int end) {
  using Zeros = Vector<uint16_t, kSlotBytes<BATCH> / 2>;
  RPG_LOOP
  for (int i = begin + thread(); i < end; i += kThreads) {
    for (int plane = 0; plane < (BATCH + 7) / 8; ++plane) {
      store(memory.p.span((plane * args.plane + i) * kSlotBytes<BATCH>, kSlotBytes<BATCH>),
            Zeros{});
    }
  }
}

// P of a tile of windows. Where laps are cut by the ends of columns, slots that no row fills
// are zeros, and so are blocks that no row reads: 0 times what they hold need not be 0. PLAIN: none
// is cut.
template <int BATCH, bool PLAIN>
RPG_FUNCTION void put_windows(const InputGradKernelArgs& args, const Tile& tile,
                              const ColumnReads& column, const EntryLane& lane, const Stage& stage,
                              const InputGradMma& memory) {
  const Layer& layer = args.layer;
  const uint32_t window = layer.law.scramble.window;
  const bool cut = !PLAIN && (layer.law.offset & (window - 1));
  const int places = places_of(layer, column);
  if (cut) {
    clear<BATCH>(args, memory, 0, args.plane);
    for (int i = thread(); i < places; i += kThreads) memory.flag[i] = 0;
    sync();
  }
  visit_rows<PLAIN>(layer, tile, column, lane, [&](const Row& row, const Stretch& stretch) {
    const int slot = lap_of(stretch.entry) * args.terms_per_lap + static_cast<int>(row.place);
    const int row_byte = row.first * kSlotBytes<BATCH> + row.offset * kSlotBytes<BATCH>;
    put<BATCH>(args, memory, row_byte, slot * kSlotBytes<BATCH>, row.sign);
    if (cut) memory.flag[place_of(stretch.entry) + row.place] = 1;
  });
  sync();
  if (!cut) return;
  const int chunks = args.bank.row_bytes / 16;
  RPG_LOOP
  for (int i = thread(); i < places; i += kThreads) {
    if (memory.flag[i]) continue;
    for (int c = 0; c < chunks; ++c) stage.blocks[i * chunks + c] = {0, 0, 0, 0};
  }
  sync();
}

// P of any other tile: slot i is row i. The places of a ring's rows go beside it.
template <int BATCH>
RPG_FUNCTION void put_rows(const InputGradKernelArgs& args, const Tile& tile, int b,
                           const Stage& stage, const InputGradMma& memory) {
  clear<BATCH>(args, memory, tile.rows, (tile.rows + kMmaBlocks - 1) / kMmaBlocks * kMmaBlocks);
  RPG_LOOP
  for (int i = thread(); i < tile.rows; i += kThreads) {
    uint32_t sign;
    if (tile.fill == Fill::kGather) {
      sign = stage.entries[i], memory.flag[i] = i;
    } else {
      const uint32_t p = position(args.layer, tile.row + i, b);
      sign = block_sign(args.layer, p), memory.flag[i] = ring_slot(args.layer, p);
    }
    put<BATCH>(args, memory, i * kSlotBytes<BATCH>, i * kSlotBytes<BATCH>, sign);
  }
  sync();
}

}  // namespace rpg::RPG_DEVICE
