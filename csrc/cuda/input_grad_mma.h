// dx of a column by tensor cores, for 16-bit numbers:
//
//   dx[m, e] = Σ_slot Σ_lap block(slot)[e] P[lap, slot, m]     e an element of the block
//
// Blocks are the first operand, transposed as they are read, for up to four laps; P
// (input_grad_permute.h) is the second. At batch 1 its 8 columns are 8 laps. Warps: 16 elements of
// the block each, times parts of the slots, whose sums are added in order.
//
// Budget of a warp, for 16 slots and 4 laps at batch 8: 3 reads, 4 products, 4 around them.

#pragma once

#include "cuda/input_grad_permute.h"

namespace rpg::RPG_DEVICE {

// What a warp and a lane do in all columns: the warp's 16 elements of a block, in parts of the
// slots. Lanes 8 i ... give rows of matrix i: elements 0 to 7 and 8 to 15, of slots 0 to 7 and 8
// to 15.
struct Share {
  int part, parts;  // The warp has this part of so many.
  int slot, chunk;  // The lane gives this chunk of this slot,
  int stage_chunk;  // which is here in a stage, counted in chunks, of the first 16 slots.
  int sum_offset;   // Its sums go here: element g, of row 2 t of dy.
  int row, p;       // Bytes at which it reads P in lap 0: of one lap, or as Operand has them.
};

template <int BATCH>
RPG_FUNCTION Share share_of(const InputGradKernelArgs& args) {
  const Layer& layer = args.layer;
  const int warp = thread() / kWarp, lane = thread() % kWarp, groups = layer.block / 16;
  const int part = layer.block == 64 ? warp >> 2 : warp >> 1, elements = warp & (groups - 1);
  const int slot = lane % 8 + lane / 16 * 8, chunk = 2 * elements + lane / 8 % 2;
  const int sums = part * BATCH + (BATCH == 1 ? 0 : 2 * (lane % 4));
  const int row = lane % 16, second = lane / 16;
  int p = row + second * (BATCH == 8 ? args.layout.terms_per_lap : args.layout.plane);
  if (BATCH == 1) p = lane / 4 * args.layout.terms_per_lap + 2 * (lane % 4);
  return {kept(part),
          kWarps / groups,
          kept(slot),
          kept(chunk),
          kept(chunk_at(slot, chunk, layer.block / 8)),
          kept(sums * kSumPitch + 16 * elements + lane / 4),
          kept(row * kSlotBytes<BATCH>),
          kept(p * kSlotBytes<BATCH>)};
}

// Bytes at which a lane reads P for LAPS laps from `lap` on, less the first slot's. Lanes give rows
// of two fragments at a time: of two laps, or of both planes of one. At batch 1 a lane reads one of
// 8 laps.
template <int BATCH, int LAPS>
struct Operand {
  static constexpr int kReads = BATCH == 8 ? (LAPS + 1) / 2 : LAPS;
  int offset[kReads];
};

template <int BATCH, int LAPS>
RPG_FUNCTION Operand<BATCH, LAPS> operand(const InputGradKernelArgs& args, const Share& share,
                                          int lap) {
  constexpr int kStep = BATCH == 8 ? 2 : 1;
  const int lap_bytes = args.layout.terms_per_lap * kSlotBytes<BATCH>;
  Operand<BATCH, LAPS> out;
  RPG_UNROLL
  for (int i = 0; i < out.kReads; ++i) {
    out.offset[i] = (BATCH == 8 && LAPS == 1 ? share.row : share.p) + (lap + kStep * i) * lap_bytes;
  }
  return out;
}

// Sums of a warp: odd and even laps apart, so that products do not wait for each other.
template <int BATCH>
using WarpSums = float[2][(BATCH + 7) / 8][4];

// c += blocks of 16 slots times LAPS laps of P; `a` are the blocks, the first slot is at byte
// slot_offset of its lap. At batch 1 lanes with `valid` have a lap.
template <class T, int BATCH, int LAPS>
RPG_FUNCTION void multiply_laps(const InputGradMma& memory, const Operand<BATCH, LAPS>& operand,
                                bool valid, const uint32_t (&a)[4], int slot_offset,
                                WarpSums<BATCH>& c) {
  if constexpr (BATCH == 1) {
    uint32_t b[2] = {0, 0};
    if (valid) {
      b[0] = load<uint32_t>(memory.p.span(operand.offset[0] + slot_offset, 4));
      b[1] = load<uint32_t>(memory.p.span(operand.offset[0] + slot_offset + 16, 4));
    }
    multiply(T{}, {c[0][0], a, b});
  } else {
    RPG_UNROLL
    for (int i = 0; i < operand.kReads; ++i) {
      uint32_t b[4];
      load_transposed(b, memory.p.span(operand.offset[i] + slot_offset, 16));
      if constexpr (BATCH == 8) {
        multiply(T{}, {c[0][0], a, b});
        if (2 * i + 1 < LAPS) multiply(T{}, {c[1][0], a, b + 2});
      } else {
        multiply(T{}, {c[i % 2][0], a, b});
        multiply(T{}, {c[i % 2][1], a, b + 2});
      }
    }
  }
}

// c += blocks times LAPS laps of P from `lap` on, for the places of a window that are this warp's.
template <class T, int BATCH, int LAPS>
RPG_FUNCTION void multiply_window(const InputGradKernelArgs& args, const InputGradMma& memory,
                                  const Stage& stage, const Share& share, int lap, int laps,
                                  WarpSums<BATCH>& c) {
  const auto of_laps = operand<BATCH, LAPS>(args, share, lap);
  const bool valid = lap + thread() % kWarp / 4 < laps;
  const int places = args.plan.places, chunks = args.layer.block / 8;
  RPG_LOOP
  for (int first = 16 * share.part; first < places; first += 16 * share.parts) {
    uint32_t a[4];
    load_transposed(a, stage.blocks.span(share.stage_chunk + first * chunks, 1));
    multiply_laps<T, BATCH, LAPS>(memory, of_laps, valid, a, first * kSlotBytes<BATCH>, c);
  }
}

// Makes dx of the column: sums[part, m, e].
template <class T, int BATCH>
RPG_FUNCTION void input_grad_products(const InputGradKernelArgs& args, const Columns& columns,
                                      const Share& share, const Stage& stage,
                                      const InputGradMma& memory, const Shared<float>& sums) {
  constexpr int kPlanes = (BATCH + 7) / 8;
  const Layer& layer = args.layer;
  const int lane = thread() % kWarp, chunks = layer.block / 8;
  const bool windows = args.plan.fill == Fill::kWindows;
  WarpSums<BATCH> c = {};
  // At batch 1, of elements g and g + 8: columns are laps, and those of laps that are not there may
  // be 0 times infinity.
  float total[2] = {};
  const int t = lane % 4;
  const auto add_laps = [&](int laps) {
    RPG_UNROLL
    for (int half = 0; half < 2; ++half) {
      total[half] += 2 * t < laps ? c[0][0][2 * half] : 0.f;
      total[half] += 2 * t + 1 < laps ? c[0][0][2 * half + 1] : 0.f;
      c[0][0][2 * half] = c[0][0][2 * half + 1] = 0;
    }
  };
  if (windows) {
    const int laps = static_cast<int>(layer.unit.by_laps.divisor);
    int lap = 0;
    if constexpr (BATCH == 1) {
      RPG_LOOP
      for (; lap < laps; lap += 8) {
        multiply_window<T, BATCH, 1>(args, memory, stage, share, lap, laps, c);
        add_laps(laps - lap);
      }
    } else {
      RPG_LOOP
      for (; lap + 4 <= laps; lap += 4) {
        multiply_window<T, BATCH, 4>(args, memory, stage, share, lap, laps, c);
      }
      RPG_LOOP
      for (; lap < laps; ++lap) {
        multiply_window<T, BATCH, 1>(args, memory, stage, share, lap, laps, c);
      }
    }
  } else {
    const auto row_lap = operand<BATCH, 1>(args, share, 0);
    RPG_LOOP
    for (int first = 16 * share.part; first < columns.rows; first += 16 * share.parts) {
      const int row = first + share.slot,
                i = row < columns.rows ? row : columns.rows - 1;  // times zeros
      const int place = place_of(memory.entry[i]);
      uint32_t a[4];
      load_transposed(a, stage.blocks.span(chunk_at(place, share.chunk, chunks), 1));
      multiply_laps<T, BATCH, 1>(memory, row_lap, lane < 4, a, first * kSlotBytes<BATCH>, c);
    }
  }
  const Shared<float> target = sums.tail(share.sum_offset);
  if constexpr (BATCH == 1) {
    if (!windows) add_laps(1);
    RPG_UNROLL
    for (int half = 0; half < 2; ++half) {
      float sum = total[half];
      sum += as_float(shuffle(as_bits(sum), lane ^ 1));
      sum += as_float(shuffle(as_bits(sum), lane ^ 2));
      if (t == 0) target[8 * half] = sum;
    }
  } else {
    RPG_UNROLL
    for (int i = 0; i < 4 * kPlanes; ++i) {
      const int plane = i / 4, m = 8 * plane + i % 2;  // behind 2 t
      target[m * kSumPitch + i % 4 / 2 * 8] = c[0][plane][i % 4] + c[1][plane][i % 4];
    }
  }
}

// Returns elements e ... of row m of dx: the sums of parts, added in order.
template <int BATCH, int COUNT>
RPG_FUNCTION Vector<float, COUNT> mma_total(int parts, int m, int e, const Shared<float>& sums) {
  const Shared<float> row = sums.tail(m * kSumPitch + e);
  auto total = load<Vector<float, COUNT>>(row.span(0, COUNT));
  const auto add = [&](int part) {
    const auto addend = load<Vector<float, COUNT>>(row.span(part * BATCH * kSumPitch, COUNT));
    RPG_UNROLL
    for (int i = 0; i < COUNT; ++i) total.value[i] += addend.value[i];
  };
  add(1);
  if (parts == 4) {
    add(2);
    add(3);
  }
  return total;
}

}  // namespace rpg::RPG_DEVICE
