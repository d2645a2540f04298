// P of a column, for 16-bit numbers: dy of a tile's rows at the slots that the rows read.
//
//   P[lap, slot, m] = ± dy[row, m]      of the row that reads the slot in that lap
//
// A permutation of dy's rows: a row whose use is number `lap` of its octet of the ring goes to that
// lap's part of P, with its sign and unrounded, without an order among lanes. P: [plane of 8 rows
// of dy][lap][slot] of 16 bytes, or at batch 1 [lap][slot] of 2. Terms that no row of the tile
// fills are zeros: others of the unit's rows, or of other units, have those uses. A tile that reads
// no windows has one lap, of its rows.

#pragma once

#include "cuda/input_grad.h"

namespace rpg::RPG_DEVICE {

struct InputGradMma {
  Shared<char> p;          // as above
  Shared<char> dy;         // [plane][row] of 16 bytes, or [row] of 2
  Shared<uint32_t> entry;  // [rows]
  Shared<uint32_t> flag;   // [places]: whether a row reads it, in a tiling of windows
};

// How many bytes a term of P has, and a row of dy.
template <int BATCH>
constexpr int kSlotBytes = BATCH == 1 ? 2 : 16;

constexpr int kLapPad = 8;  // at batch 1, so that 8 laps are on different banks

RPG_HOST InputGradLayout mma_layout(const Layer& layer, const Tiling& tiling, int row_bytes,
                                    int batch_tile) {
  InputGradLayout out{};
  out.stages = stage_layout(tiling, row_bytes);
  const bool windows = tiling.fill == Fill::kWindows;
  const int planes = (batch_tile + 7) / 8, slot_bytes = batch_tile == 1 ? 2 : 16 * planes;
  const int laps = windows ? static_cast<int>(layer.unit.by_laps.divisor) : 1;
  out.terms_per_lap = windows ? tiling.places : round_up(tiling.rows, kMmaBlocks);
  if (windows && batch_tile == 1) out.terms_per_lap += kLapPad;
  out.plane = laps * out.terms_per_lap;
  out.terms = out.stages.end;
  out.dy = out.terms + round_up(out.plane * slot_bytes, kAlign);
  out.entry = out.dy + round_up(tiling.rows * slot_bytes, kAlign);
  out.flag = out.entry + round_up(4 * tiling.rows, kAlign);
  out.sums = out.flag + (windows ? 4 * tiling.places : 0);
  const int parts = kWarps / (row_bytes / 32);
  out.last = out.sums + 4 * parts * batch_tile * kSumPitch;
  out.bytes = out.last + kAlign;
  return out;
}

template <int BATCH>
RPG_FUNCTION InputGradMma mma_shared(const InputGradKernelArgs& args) {
  constexpr int kBytes = (BATCH + 7) / 8 * kSlotBytes<BATCH>;
  const InputGradLayout& layout = args.layout;
  const Plan& plan = args.plan;
  return {Shared<char>(layout.terms, layout.plane * kBytes),
          Shared<char>(layout.dy, plan.rows * kBytes), Shared<uint32_t>(layout.entry, plan.rows),
          Shared<uint32_t>(layout.flag, plan.fill == Fill::kWindows ? plan.places : 0)};
}

// dy of the tile into shared memory, zeros behind the batch.
template <class T, int BATCH>
RPG_FUNCTION void load_dy(const InputGradKernelArgs& args, const Columns& columns, int m0,
                          const InputGradMma& memory) {
  using Bits = typename T::Bits;
  constexpr int kVectorRows = BATCH == 1 ? 1 : 8;
  const Bits* const dy = static_cast<const Bits*>(args.call.dy) + columns.row;
  RPG_LOOP
  for (int i = thread(); i < columns.rows; i += kThreads) {
    RPG_UNROLL
    for (int plane = 0; plane < BATCH / kVectorRows; ++plane) {
      Vector<Bits, kVectorRows> v;
      RPG_UNROLL
      for (int j = 0; j < kVectorRows; ++j) {
        const int m = m0 + kVectorRows * plane + j;
        v.value[j] = m < args.call.batch ? dy[int64_t{m} * args.layer.rows + i] : Bits{0};
      }
      store(memory.dy.span((plane * args.plan.rows + i) * kSlotBytes<BATCH>, kSlotBytes<BATCH>), v);
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
      const int row = plane * 16 * args.plan.rows + row_byte;
      auto v = load<Vector<uint32_t, 4>>(memory.dy.span(row, 16));
      RPG_UNROLL
      for (int j = 0; j < 4; ++j) v.value[j] ^= sign_bits;
      store(memory.p.span(plane * 16 * args.layout.plane + target_byte, 16), v);
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
      store(memory.p.span((plane * args.layout.plane + i) * kSlotBytes<BATCH>, kSlotBytes<BATCH>),
            Zeros{});
    }
  }
}

// P of a tile, whose entries are visible after the next barrier: row i of a tile that reads no
// windows is term i. Where the column's window has as many terms, in all of its laps, as the tile
// has rows, each row fills one of them; otherwise what no row fills is
// made zeros, and so are blocks of the window that no row reads: 0 times what they hold need not be
// 0. All threads call it; it ends with a barrier.
template <int BATCH>
RPG_FUNCTION void put_rows(const InputGradKernelArgs& args, const Columns& columns,
                           const Stage& stage, const InputGradMma& memory) {
  const bool windows = args.plan.fill == Fill::kWindows;
  const int laps = static_cast<int>(args.layer.unit.by_laps.divisor), room = args.plan.places;
  const bool gaps = windows && (stage.filled != room || stage.filled * laps != columns.rows);
  if (gaps) {
    clear<BATCH>(args, memory, 0, args.layout.plane);
    for (int i = thread(); i < room; i += kThreads) memory.flag[i] = 0;
  } else if (!windows) {
    clear<BATCH>(args, memory, columns.rows, args.layout.plane);
  }
  sync();
  RPG_LOOP
  for (int i = thread(); i < columns.rows; i += kThreads) {
    const uint32_t entry = memory.entry[i];
    const int place = place_of(entry);
    const int term = windows ? lap_of(entry) * args.layout.terms_per_lap + place : i;
    put<BATCH>(args, memory, i * kSlotBytes<BATCH>, term * kSlotBytes<BATCH>, entry);
    if (gaps) memory.flag[place] = 1;
  }
  sync();
  if (!gaps) return;
  const int chunks = args.layout.stages.row_bytes / 16;
  RPG_LOOP
  for (int i = thread(); i < room; i += kThreads) {
    if (memory.flag[i]) continue;
    for (int c = 0; c < chunks; ++c) stage.blocks[i * chunks + c] = {0, 0, 0, 0};
  }
  sync();
}

}  // namespace rpg::RPG_DEVICE
