// linear: y [batch, N] = scale · x [batch, K] · (G ring)ᵀ + bias, Ŵ = G ring never in memory.
//
// The rows of a column of blocks that read the same stored block need the same product with x:
//
//   S[place, m] = block(place) · x[m, column]     once for each place of the column's stage
//   y[n, m]    += ± S[place(n), m]                 one addition for each row
//
// so tensor cores multiply what a window holds, not what its `laps` rows make of it, and shared
// memory is read at random in S, 4 bytes for each row of x, not in 128-byte blocks.
//
// Grid: tiles of up to 1024 rows x splits of the columns x tiles of the batch; 256 threads, each
// with kRows rows of y and BATCH sums for each in registers. A CTA goes from column to column: wait
// for the stage, begin the copies of a later one, entries, products, barrier, sums. Sums of splits
// go through the workspace; the last CTA of a tile adds them in order, so results do not depend
// on who is last.
//
// Shared memory, from byte 0 on:
//
//   stages of blocks   stages · places · block    3 · 32 KB for windows of 256 slots of 64 bf16
//   units of columns   32 · 80                    of windows
//   entries of stages  stages · rows · 4          of gathered blocks
//   S                  (places + 4) · BATCH · 4   four times that at batch 1
//   entries            1024 · 4
//   tiles of x         stages · BATCH · block
//   the last CTA?      16
//
// Accesses of 16 bytes by 8 neighbouring threads fall on different banks: rows of a window by the
// exchange of chunks (stage.h), S by the residues of the unit law. Bytes from global memory for a
// column of a tile: its window, once.
//
// Instructions for a weight: docs/cuda.md.

#include <stdexcept>

#include "cuda/linear.h"
#include "cuda/linear_products.h"

namespace rpg::RPG_DEVICE {

namespace {

// Writes y[m, n], whose sum is `sum`.
template <class T>
RPG_FUNCTION void write(const LinearKernelArgs& args, int m, int n, float sum) {
  sum *= args.scale;
  if (args.bias) sum += args.bias[n];
  static_cast<typename T::Bits*>(args.y)[int64_t{m} * args.layer.rows + n] = T::store(sum);
}

template <class Math, int BATCH>
RPG_KERNEL(kThreads, 1)
linear_kernel(RPG_ARGS LinearKernelArgs args) {
  using Sizes = LinearShape<Math, BATCH>;
  using Number = typename Math::Number;
  const Layer& layer = args.layer;
  const Tiling& tiling = args.tiling;
  const Tile tile = tile_at(layer, tiling, cta_x());
  const int m0 = cta_z() * BATCH;
  const int first = static_cast<int>(int64_t{layer.blocks} * cta_y() / args.splits);
  const int end = static_cast<int>(int64_t{layer.blocks} * (cta_y() + 1) / args.splits);
  const ColumnRange range{first, end};
  const bool ring = tiling.fill == Fill::kRing, windows = tiling.fill == Fill::kWindows;

  const StageLayout& layout = args.layout;
  const Shared<float> s(args.s, Sizes::kSums * (tiling.places + kPlaneGap));
  const Shared<uint32_t> entry(args.entry, kMaxRows);
  const Shared<ColumnUnit> units = units_of(layout, tiling);
  const auto x_of = [&](int i) { return Shared<char>(args.x_at + i * args.x_bytes, args.x_bytes); };
  const BankCopies copies = copies_of(layout, args.bank);
  const int row_places = ring ? static_cast<int>(layer.slots) : tile.rows;  // places, of no windows
  const XCopy x_copy_of = x_copy<Math, BATCH>(args, m0);
  // Copies of column b to stage i, in a group of their own even where there are none.
  const auto begin = [&](int b, int i) {
    if (b < end) {
      fill_stage(tiling, layout, args.bank, tile, range, units, copies, b,
                 stage_of(layout, tiling, i));
      fill_x<Math, BATCH>(args, x_copy_of, m0, b, x_of(i));
    }
    commit_copies();
  };
  constexpr bool kSpread = BATCH == 1;
  const int unfinished = kept(unfinished_from(layer));
  [[maybe_unused]] const auto product = product_lane<Math, BATCH>(args);
  float y[Sizes::kRows][BATCH] = {};
  // Rows behind the tile's read the first place, and are not written.
  for (int i = tile.rows + thread(); i < kMaxRows; i += kThreads) entry[i] = 0;
  if (windows) find_units(layer, tile, range, units, 0);
  for (int i = 0; i < layout.depth; ++i) {
    if (tiling.fill == Fill::kGather && first + i < end) {
      prepare_rows(layer, tile, first + i, stage_of(layout, tiling, i));
    }
  }
  sync();
  for (int i = 0; i < layout.depth - 1; ++i) begin(first + i, i);
  int current = 0;  // stage of column b
  RPG_LOOP
  for (int b = first; b < end; ++b, current = stage_after(layout.depth, current, 1)) {
    wait_stage(layout.depth);
    sync();
    begin(b + layout.depth - 1, stage_after(layout.depth, current, layout.depth - 1));
    const Stage stage = stage_of(layout, tiling, current);
    int used = row_places;
    if (windows) used = static_cast<int>(unit_of(units, range, b).places);
    if (b >= unfinished) sign_and_clear<Number>(layer, tile, used, b, stage);
    if (windows) {
      unit_entries<kSpread>(layer, tile, b, unit_of(units, range, b), entry);
    } else {
      row_entries<kSpread>(layer, tiling, tile, b, stage, entry);
    }
    if constexpr (Math::kTensorCores) {
      products_mma<Math, BATCH>(args, product, used, stage, x_of(current), s);
    } else {
      products_fma<BATCH>(args, used, stage, x_of(current), s);
    }
    sync();
    if (windows) {
      find_next_units(layer, tile, range, units, b);
    } else if (!ring && b + layout.depth < end) {
      prepare_rows(layer, tile, b + layout.depth, stage);
    }
    RPG_UNROLL
    for (int k = 0; k < Sizes::kRows; ++k) {
      if (k * kThreads >= tile.rows) break;
      const uint32_t row_entry = entry[thread() + k * kThreads];
      const int place = place_of(row_entry);
      if (BATCH == 1) {
        y[k][0] += as_float(as_bits(s[place]) ^ (row_entry & 0x80000000u));
      }
      const float sign = sign_of(row_entry);
      RPG_UNROLL
      for (int plane = 0; plane < Sizes::kPlanes; ++plane) {
        const auto v = load<Vector<float, 4>>(s.span(s_at(plane, place, tiling.places), 4));
        RPG_UNROLL
        for (int m = 0; m < 4; ++m) {
          y[k][4 * plane + m] = fused(sign, v.value[m], y[k][4 * plane + m]);
        }
      }
    }
  }

  const int batch = args.batch - m0 < BATCH ? args.batch - m0 : BATCH;
  RPG_UNROLL
  for (int k = 0; k < Sizes::kRows; ++k) {
    const int i = thread() + k * kThreads, n = tile.row + i;
    if (i >= tile.rows) continue;
    RPG_UNROLL
    for (int m = 0; m < BATCH; ++m) {
      if (m >= batch) continue;
      if (args.splits == 1) {
        write<Number>(args, m0 + m, n, y[k][m]);
      } else {
        args.partial[(int64_t{cta_y()} * args.batch + m0 + m) * layer.rows + n] = y[k][m];
      }
    }
  }
  if (args.splits == 1) return;
  const Shared<int> last(args.last, 1);
  sync();
  if (thread() == 0) {
    last[0] = arrive(args.counters + cta_z() * tiling.tiles + cta_x(), args.splits);
  }
  sync();
  if (!last[0]) return;
  RPG_LOOP
  for (int i = thread(); i < tile.rows * batch; i += kThreads) {
    const int m = i / tile.rows, n = tile.row + i - m * tile.rows;
    const float* partial = args.partial + int64_t{m0 + m} * layer.rows + n;
    float sum = 0;
    for (int split = 0; split < args.splits; ++split) {
      sum += partial[int64_t{split} * args.batch * layer.rows];
    }
    write<Number>(args, m0 + m, n, sum);
  }
}

template <class Math, int BATCH>
void run(const LayerLaw& law, const Plan& plan, const CudaLinearArgs& args) {
  using Sizes = LinearShape<Math, BATCH>;
  LinearKernelArgs kernel_args{};
  kernel_args.layer = layer_of(law, args.columns);
  kernel_args.tiling = tiling_of(plan);
  kernel_args.bank = bank_of(args.ring, law.slots, law.granularity * Sizes::kBytes);
  kernel_args.x_bytes = BATCH * law.granularity * Sizes::kBytes;
  const LinearSharedPlan shared = shared_plan(kernel_args.tiling, kernel_args.bank.row_bytes,
                                              kernel_args.x_bytes, Sizes::kSums);
  kernel_args.layout = shared.layout, kernel_args.s = shared.s, kernel_args.entry = shared.entry,
  kernel_args.x_at = shared.x_at, kernel_args.last = shared.last;
  kernel_args.x = args.x, kernel_args.bias = args.bias, kernel_args.y = args.y;
  kernel_args.partial = args.workspace, kernel_args.counters = args.counters;
  kernel_args.scale = static_cast<float>(args.scale);
  kernel_args.batch = static_cast<int>(args.batch), kernel_args.splits = plan.splits;
  kernel_args.x_aligned =
      reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && args.columns * Sizes::kBytes % 16 == 0;
  launch(linear_kernel<Math, BATCH>, {plan.tiles, plan.splits, plan.batch_tiles}, kThreads,
         plan.shared_bytes, args.stream, kernel_args);
}

template <class Math>
void run_batch(const LayerLaw& law, const Plan& plan, const CudaLinearArgs& args) {
  switch (plan.batch_tile) {
    case 1: return run<Math, 1>(law, plan, args);
    case 8: return run<Math, 8>(law, plan, args);
    case 16: return run<Math, 16>(law, plan, args);
    default:  // fp32 sums would not leave registers enough
      if constexpr (Math::kTensorCores) run<Math, 32>(law, plan, args);
  }
}

}  // namespace

Plan plan_linear(const LayerLaw& law, Dtype dtype, int64_t batch, int64_t, const Device& device) {
  const int block = law.granularity, size = element_bytes(dtype);
  const bool tensor_cores = dtype != Dtype::kFloat32;
  const auto bytes = [&](const Tiling& tiling, int batch_tile) {
    const int x_bytes = batch_tile * block * size, sums = batch_tile == 1 ? 4 : batch_tile;
    return shared_plan(tiling, block * size, x_bytes, sums).bytes;
  };
  Plan out = plan_tiles(law, block * size, batch, tensor_cores ? 32 : 16, device, bytes);
  if (out.splits > 1) {
    out.workspace = int64_t{out.splits} * batch * law.rows;
    out.counters = out.tiles * out.batch_tiles;
  }
  return out;
}

void linear(const LayerLaw& law, const Plan& plan, const CudaLinearArgs& args) {
  switch (args.dtype) {
    case Dtype::kBfloat16: return run_batch<Mma<Bfloat16>>(law, plan, args);
    case Dtype::kFloat16: return run_batch<Mma<Float16>>(law, plan, args);
    default: return run_batch<Fma>(law, plan, args);
  }
}

}  // namespace rpg::RPG_DEVICE
