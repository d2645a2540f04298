// linear_input_grad: dx [batch, K] = scale · dy [batch, N] · (G ring), Ŵ = G ring never in memory.
//
// The adjoint of linear.cu, and cut in the same way: tiles of rows x splits of the columns x tiles
// of the batch, 256 threads. For each column of blocks the rows of dy are brought to the stored
// blocks that their rows of the tile read, and each block is multiplied once:
//
//   dx[m, column] = Σ_place (Σ ± dy[row, m], rows that read the place) block(place)
//
// input_grad_mma.h does so for 16-bit numbers on tensor cores, input_grad_fma.h for fp32. Sums of
// tiles go through the workspace; the last CTA of a split adds them in order.
//
// Shared memory, from byte 0 on:
//
//   stages, units, entries of stages                          as of linear.cu
//   P, the permutation of dy    laps · places · BATCH · 2     in 16 bits; each in planes of 8 rows
//   dy of the tile              rows · BATCH · 2              of the batch
//   or T                        places · BATCH · 4            in fp32
//   entries                     rows · 4
//   flags of places             places · 4                    in 16 bits, of windows
//   sums of parts               parts · BATCH · 68 · 4        in fp32 2 · BATCH · 272 · 4
//   the last CTA?               16
//
// Instructions for a weight: docs/cuda.md.

#include <stdexcept>

#include "cuda/input_grad_fma.h"
#include "cuda/input_grad_mma.h"
#include "cuda/linear.h"

namespace rpg::RPG_DEVICE {

namespace {

// What this thread writes of each block: elements e ... e + count - 1 of rows m, m + step ... of
// the batch. Four at once where they are sums of a tile and their addresses allow for it.
struct Output {
  int count, e, m, step;
  int64_t index;  // Where row m of block 0 is, in dx or in this tile's sums.
};

RPG_FUNCTION Output output_of(const InputGradKernelArgs& args, int m0, bool fours) {
  const int count = fours && args.tiling.tiles > 1 && args.layer.columns % 4 == 0 ? 4 : 1;
  const int threads_across = args.layer.block / count;  // a power of two
  const int e = (thread() & (threads_across - 1)) * count, m = thread() / threads_across;
  const int64_t tile = args.tiling.tiles == 1 ? 0 : int64_t{cta_x()} * args.batch;
  return {count, kept(e), kept(m), kThreads / threads_across,
          kept((tile + m0 + m) * args.layer.columns + e)};
}

// Writes column b of this tile's sums, or of dx where there is one tile, from the sums of parts.
template <class Math, int BATCH>
RPG_FUNCTION void write_column(const InputGradKernelArgs& args, const Output& out, int b, int batch,
                               const Share& share, const Shared<float>& sums) {
  using Number = typename Math::Number;
  constexpr bool kFma = sizeof(typename Number::Bits) == 4;
  const int block = args.layer.block, columns = args.layer.columns;
  if (b * block + out.e >= columns) return;
  int64_t index = out.index + b * block;
  if constexpr (!kFma) {
    if (out.count == 4) {
      RPG_LOOP
      for (int m = out.m; m < batch; m += out.step, index += int64_t{out.step} * columns) {
        store(args.partial + index, mma_total<BATCH, 4>(share.parts, m, out.e, sums));
      }
      return;
    }
  }
  const bool whole = args.tiling.tiles == 1;
  RPG_LOOP
  for (int m = out.m; m < batch; m += out.step, index += int64_t{out.step} * columns) {
    float total;
    if constexpr (kFma) {
      total = fma_total(block, m, out.e, sums);
    } else {
      total = mma_total<BATCH, 1>(share.parts, m, out.e, sums).value[0];
    }
    if (whole) {
      static_cast<typename Number::Bits*>(args.dx)[index] = Number::store(total * args.scale);
    } else {
      args.partial[index] = total;
    }
  }
}

template <class Math, int BATCH>
RPG_KERNEL(kThreads, 1)
linear_input_grad_kernel(RPG_ARGS InputGradKernelArgs args) {
  using Number = typename Math::Number;
  constexpr bool kFma = sizeof(typename Number::Bits) == 4;
  const Layer& layer = args.layer;
  const Tiling& tiling = args.tiling;
  const StageLayout& layout = args.layout;
  const Tile tile = tile_at(layer, tiling, cta_x());
  const int m0 = cta_z() * BATCH;
  const int batch = args.batch - m0 < BATCH ? args.batch - m0 : BATCH;
  const int first = static_cast<int>(int64_t{layer.blocks} * cta_y() / args.splits);
  const int end = static_cast<int>(int64_t{layer.blocks} * (cta_y() + 1) / args.splits);
  const ColumnRange range{first, end};
  const bool ring = tiling.fill == Fill::kRing, windows = tiling.fill == Fill::kWindows;
  const int row_places = ring ? static_cast<int>(layer.slots) : tile.rows;  // of no windows

  const int parts = kFma ? 2 * kPitch : kWarps / (layer.block / 16) * kSumPitch;
  const Shared<float> sums(args.sums, parts * BATCH);
  const Shared<ColumnUnit> units = units_of(layout, tiling);
  const BankCopies copies = copies_of(layout, args.bank);
  const int unfinished = kept(unfinished_from(layer));
  const Share share = share_of<BATCH>(args);
  const Output out = output_of(args, m0, !kFma);
  // Copies of column b to stage i, in a group of their own even where there are none.
  const auto begin = [&](int b, int i) {
    if (b < end) {
      fill_stage(tiling, layout, args.bank, tile, range, units, copies, b,
                 stage_of(layout, tiling, i));
    }
    commit_copies();
  };

  if (windows) find_units(layer, tile, range, units, 0);
  for (int i = 0; i < layout.depth; ++i) {
    if (tiling.fill == Fill::kGather && first + i < end) {
      prepare_rows(layer, tile, first + i, stage_of(layout, tiling, i));
    }
  }
  const auto dy = [&] {
    if constexpr (kFma) {
      return fma_shared<BATCH>(args, tile, m0);
    } else {
      const InputGradMma out = mma_shared<BATCH>(args);
      load_dy<Number, BATCH>(args, tile, m0, out);
      return out;
    }
  }();
  sync();
  for (int i = 0; i < layout.depth - 1; ++i) begin(first + i, i);
  int current = 0;  // stage of column b
  RPG_LOOP
  for (int b = first; b < end; ++b, current = stage_after(layout.depth, current, 1)) {
    wait_stage(layout.depth);
    sync();
    begin(b + layout.depth - 1, stage_after(layout.depth, current, layout.depth - 1));
    const Stage stage = stage_of(layout, tiling, current);
    int places = row_places;
    if (windows) places = static_cast<int>(unit_of(units, range, b).places);
    if (b >= unfinished) sign_and_clear<Number>(layer, tile, places, b, stage);
    if (windows) {
      unit_entries<false>(layer, tile, b, unit_of(units, range, b), dy.entry);
    } else {
      row_entries<false>(layer, tiling, tile, b, stage, dy.entry);
    }
    if constexpr (kFma) {
      sum_terms<BATCH>(args, tile, places, stage, dy);
      input_grad_products<BATCH>(args, tile, places, stage, dy, sums);
    } else {
      put_rows<BATCH>(args, tile, places, stage, dy);
      input_grad_products<Math, BATCH>(args, tile, share, stage, dy, sums);
    }
    if (windows) find_next_units(layer, tile, range, units, b);
    sync();
    if (tiling.fill == Fill::kGather && b + layout.depth < end) {
      prepare_rows(layer, tile, b + layout.depth, stage);
    }
    write_column<Math, BATCH>(args, out, b, batch, share, sums);
  }
  if (tiling.tiles == 1) return;
  const Shared<int> last(args.last, 1);
  sync();
  if (thread() == 0) {
    last[0] = arrive(args.counters + cta_z() * args.splits + cta_y(), tiling.tiles);
  }
  sync();
  if (!last[0]) return;
  const int low = first * layer.block;
  const int high = end * layer.block < layer.columns ? end * layer.block : layer.columns;
  RPG_LOOP
  for (int i = thread(); i < (high - low) * batch; i += kThreads) {
    const int m = i / (high - low), column = low + i - m * (high - low);
    const int64_t at_column = int64_t{m0 + m} * layer.columns + column;
    float sum = 0;
    for (int part = 0; part < tiling.tiles; ++part) {
      sum += args.partial[int64_t{part} * args.batch * layer.columns + at_column];
    }
    static_cast<typename Number::Bits*>(args.dx)[at_column] = Number::store(sum * args.scale);
  }
}

InputGradPlan plan_of(const Layer& layer, const Tiling& tiling, int size, int batch_tile) {
  const auto plan = size == 4 ? fma_plan : mma_plan;
  return plan(layer, tiling, layer.block * size, batch_tile);
}

template <class Math, int BATCH>
void run(const LayerLaw& law, const Plan& plan, const CudaLinearInputGradArgs& args) {
  constexpr int kSize = sizeof(typename Math::Number::Bits);
  InputGradKernelArgs kernel_args{};
  kernel_args.layer = layer_of(law, args.columns);
  kernel_args.tiling = tiling_of(plan);
  kernel_args.bank = bank_of(args.ring, law.slots, law.granularity * kSize);
  kernel_args.dy = args.dy, kernel_args.dx = args.dx;
  kernel_args.partial = args.workspace, kernel_args.counters = args.counters;
  kernel_args.scale = static_cast<float>(args.scale);
  kernel_args.batch = static_cast<int>(args.batch), kernel_args.splits = plan.splits;
  const InputGradPlan shared = plan_of(kernel_args.layer, kernel_args.tiling, kSize, BATCH);
  kernel_args.layout = shared.layout, kernel_args.terms_per_lap = shared.terms_per_lap,
  kernel_args.plane = shared.plane;
  kernel_args.terms = shared.terms, kernel_args.dy_at = shared.dy_at,
  kernel_args.entry = shared.entry, kernel_args.flag = shared.flag, kernel_args.sums = shared.sums,
  kernel_args.last = shared.last;
  launch(linear_input_grad_kernel<Math, BATCH>, {plan.tiles, plan.splits, plan.batch_tiles},
         kThreads, plan.shared_bytes, args.stream, kernel_args);
}

template <class Math>
void run_batch(const LayerLaw& law, const Plan& plan, const CudaLinearInputGradArgs& args) {
  switch (plan.batch_tile) {
    case 1: return run<Math, 1>(law, plan, args);
    case 8: return run<Math, 8>(law, plan, args);
    default: return run<Math, 16>(law, plan, args);
  }
}

}  // namespace

Plan plan_linear_input_grad(const LayerLaw& law, Dtype dtype, int64_t batch, int64_t columns,
                            const Device& device) {
  const int size = element_bytes(dtype);
  const Layer layer = layer_of(law, columns);
  const auto bytes = [&](const Tiling& tiling, int batch_tile) {
    return plan_of(layer, tiling, size, batch_tile).bytes;
  };
  Plan out = plan_tiles(law, law.granularity * size, batch, 16, device, bytes);
  if (out.tiles > 1) {
    out.workspace = int64_t{out.tiles} * batch * columns;
    out.counters = out.splits * out.batch_tiles;
  }
  return out;
}

void linear_input_grad(const LayerLaw& law, const Plan& plan, const CudaLinearInputGradArgs& args) {
  switch (args.dtype) {
    case Dtype::kBfloat16: return run_batch<Mma<Bfloat16>>(law, plan, args);
    case Dtype::kFloat16: return run_batch<Mma<Float16>>(law, plan, args);
    default: return run_batch<Fma>(law, plan, args);
  }
}

}  // namespace rpg::RPG_DEVICE
