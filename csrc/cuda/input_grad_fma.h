// dx of a column in fp32, without tensor cores:
//
//   T[place, m]   += ± dy[row, m]                 for the rows that read a place
//   dx[m, column]  = Σ_place T[place, m] block(place)
//
// The tile's dy stays in registers, kRows · BATCH of a thread. Rows of a window's one lap read
// different places, so a lap's terms are added without atomics, with a barrier between laps: the
// order of additions is that of the law. Rows of a ring that fits have no such order: there T is
// row by row.

#pragma once

#include "cuda/input_grad.h"

namespace rpg::RPG_DEVICE {

// How many rows of dy are taken at a time.
template <int BATCH>
struct FmaShape {
  static constexpr int kRows = 4;                         // of a thread
  static constexpr int kVectorRows = BATCH == 1 ? 1 : 4;  // of a vector of T
  static constexpr int kPlanes = BATCH / kVectorRows;
};

// The sums of a row of dx's odd elements lie so far behind those of its even ones. Both are read
// together, so they are on different banks.
constexpr int kPitch = kThreads + 16;

// T holds places, or rows where the ring is whole.
RPG_HOST InputGradLayout fma_layout(const Layer&, const Tiling& tiling, int row_bytes,
                                    int batch_tile) {
  InputGradLayout out{};
  out.stages = stage_layout(tiling, row_bytes);
  out.terms_per_lap = tiling.fill == Fill::kRing ? tiling.rows : tiling.places;
  out.terms = out.stages.end;
  out.entry = out.terms + 4 * batch_tile * out.terms_per_lap;
  out.sums = out.entry + round_up(4 * tiling.rows, kAlign);
  out.last = out.sums + 4 * 2 * kPitch * batch_tile;
  out.bytes = out.last + kAlign;
  return out;
}

template <int BATCH>
struct InputGradFma {
  Shared<float> t;         // [plane][terms_per_lap][kVectorRows]
  Shared<uint32_t> entry;  // [rows]
  float dy[FmaShape<BATCH>::kRows][BATCH];
};

template <int BATCH>
RPG_FUNCTION InputGradFma<BATCH> fma_shared(const InputGradKernelArgs& args, const Columns& columns,
                                            int m0) {
  InputGradFma<BATCH> out;
  out.t = Shared<float>(args.layout.terms, BATCH * args.layout.terms_per_lap);
  out.entry = Shared<uint32_t>(args.layout.entry, args.plan.rows);
  const float* const dy = static_cast<const float*>(args.call.dy) + columns.row;
  RPG_UNROLL
  for (int k = 0; k < FmaShape<BATCH>::kRows; ++k) {
    const int i = thread() + k * kThreads;
    RPG_UNROLL
    for (int m = 0; m < BATCH; ++m) {
      const bool valid = i < columns.rows && m0 + m < args.call.batch;
      out.dy[k][m] = valid ? dy[int64_t{m0 + m} * args.layer.rows + i] : 0.f;
    }
  }
  return out;
}

template <int BATCH>
RPG_FUNCTION int t_at(int plane, int term, int terms) {
  return (plane * terms + term) * FmaShape<BATCH>::kVectorRows;
}

// Adds T of a column from entries and dy; ends with a barrier.
template <int BATCH>
RPG_FUNCTION void add_terms(const InputGradKernelArgs& args, const Columns& columns, int laps,
                            const InputGradFma<BATCH>& memory) {
  using DyVectors = FmaShape<BATCH>;
  RPG_LOOP
  for (int lap = 0; lap < laps; ++lap) {
    RPG_UNROLL
    for (int k = 0; k < DyVectors::kRows; ++k) {
      const int i = thread() + k * kThreads;
      if (i >= columns.rows || lap_of(memory.entry[i]) != lap) continue;
      const float sign = sign_of(memory.entry[i]);
      const int term = args.plan.fill == Fill::kRing ? i : place_of(memory.entry[i]);
      RPG_UNROLL
      for (int plane = 0; plane < DyVectors::kPlanes; ++plane) {
        float* const target = memory.t.span(t_at<BATCH>(plane, term, args.layout.terms_per_lap),
                                            DyVectors::kVectorRows);
        auto v = load<Vector<float, DyVectors::kVectorRows>>(target);
        RPG_UNROLL
        for (int m = 0; m < DyVectors::kVectorRows; ++m) {
          v.value[m] = fused(sign, memory.dy[k][plane * DyVectors::kVectorRows + m], v.value[m]);
        }
        store(target, v);
      }
    }
    sync();
  }
}

// Blocks that no row reads become zeros: 0 times what they hold need not be 0. T is memory for it.
template <int BATCH>
RPG_FUNCTION void clear_unread(const InputGradKernelArgs& args, const Columns& columns,
                               const Stage& stage, const InputGradFma<BATCH>& memory) {
  const int chunks = args.layout.stages.row_bytes / 16;
  RPG_LOOP
  for (int i = thread(); i < stage.filled; i += kThreads) memory.t[i] = 0;
  sync();
  RPG_LOOP
  for (int i = thread(); i < columns.rows; i += kThreads) memory.t[place_of(memory.entry[i])] = 1;
  sync();
  RPG_LOOP
  for (int i = thread(); i < stage.filled; i += kThreads) {
    if (memory.t[i] != 0) continue;
    for (int c = 0; c < chunks; ++c) stage.blocks[i * chunks + c] = {0, 0, 0, 0};
  }
  sync();
}

// Makes T of a column, whose entries are visible after the next barrier. All threads call it; it
// ends with a barrier.
template <int BATCH>
RPG_FUNCTION void sum_terms(const InputGradKernelArgs& args, const Columns& columns,
                            const Stage& stage, const InputGradFma<BATCH>& memory) {
  using DyVectors = FmaShape<BATCH>;
  const Fill fill = args.plan.fill;
  if (fill == Fill::kWindows) clear_unread<BATCH>(args, columns, stage, memory);
  const int terms = fill == Fill::kRing ? columns.rows : stage.filled;
  for (int plane = 0; plane < DyVectors::kPlanes; ++plane) {
    RPG_LOOP
    for (int i = thread(); i < terms * DyVectors::kVectorRows; i += kThreads) {
      memory.t[t_at<BATCH>(plane, 0, args.layout.terms_per_lap) + i] = 0.f;
    }
  }
  sync();
  const int laps = fill == Fill::kWindows ? static_cast<int>(args.layer.unit.by_laps.divisor) : 1;
  add_terms<BATCH>(args, columns, laps, memory);
}

// Makes dx of a pair of elements, of this part's share of the terms: sums[2 m + odd
// element][thread].
template <int BATCH>
RPG_FUNCTION void input_grad_products(const InputGradKernelArgs& args, const Columns& columns,
                                      const Stage& stage, const InputGradFma<BATCH>& memory,
                                      const Shared<float>& sums) {
  using DyVectors = FmaShape<BATCH>;
  const bool ring = args.plan.fill == Fill::kRing;
  const int pairs = args.layer.block / 2, pair = thread() % pairs, parts = kThreads / pairs;
  const int chunk = pair / 2, rest = 2 * pair % 4, chunks = args.layout.stages.row_bytes / 16;
  const int terms = ring ? columns.rows : stage.filled;
  float sum[2][BATCH] = {};
  for (int term = thread() / pairs; term < terms; term += parts) {
    const int place = ring ? place_of(memory.entry[term]) : term;
    const uint4* const stored = stage.blocks.span(chunk_at(place, chunk, chunks), 1);
    const auto w = load<Vector<float, 2>>(reinterpret_cast<const float*>(stored) + rest);
    RPG_UNROLL
    for (int plane = 0; plane < DyVectors::kPlanes; ++plane) {
      const auto v = load<Vector<float, DyVectors::kVectorRows>>(memory.t.span(
          t_at<BATCH>(plane, term, args.layout.terms_per_lap), DyVectors::kVectorRows));
      RPG_UNROLL
      for (int m = 0; m < DyVectors::kVectorRows; ++m) {
        sum[0][plane * DyVectors::kVectorRows + m] =
            fused(v.value[m], w.value[0], sum[0][plane * DyVectors::kVectorRows + m]);
        sum[1][plane * DyVectors::kVectorRows + m] =
            fused(v.value[m], w.value[1], sum[1][plane * DyVectors::kVectorRows + m]);
      }
    }
  }
  RPG_UNROLL
  for (int m = 0; m < BATCH; ++m) {
    sums[(2 * m) * kPitch + thread()] = sum[0][m];
    sums[(2 * m + 1) * kPitch + thread()] = sum[1][m];
  }
}

// Returns element e of row m of dx: the sums of parts, added in order.
RPG_FUNCTION float fma_total(int block, int m, int e, const Shared<float>& sums) {
  const int pairs = block / 2;
  float total = 0;
  for (int part = 0; part < kThreads / pairs; ++part) {
    total += sums[(2 * m + e % 2) * kPitch + part * pairs + e / 2];
  }
  return total;
}

}  // namespace rpg::RPG_DEVICE
