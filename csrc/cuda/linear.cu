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
// Grid: tiles of 1024 rows x splits of the columns x tiles of the batch; 256 threads, each with
// kRows rows of y and BATCH sums for each in registers. A CTA goes from column to column: wait
// for the stage, begin the copies of a later one, entries, products, barrier, sums. Sums of splits
// go through the workspace; the last CTA of a tile adds them in order, so results do not depend
// on who is last.
//
// Shared memory: stages · places · block (3 · 32 KB for windows of 256 slots of 64 bf16 and 4
// laps), S (places · BATCH · 4, four times that at batch 1), entries, tiles of x. Accesses of 16
// bytes by 8 neighbouring threads fall on different banks: rows of a window by the exchange of
// chunks (stage.h), S by the residues of the window law. Bytes from global memory for a column of a
// tile: its windows, once.
//
// Instructions for a row and a column, 64 weights, as compiled for sm_90a (docs/cuda.md), in the
// loop of the most common tiles: 40 for the entry, 5 at batch 1 to 24 at 16 for sums, 15 to 19 for
// products, 14 for copies, 14 to 19 around them.
// Predicted on an H200, 14336x4096, bf16, windows 256 x 4, batch 1: 8.8 us, bound by 29 MB of
// windows from a second-level cache of 5.5 TB/s.

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
  const bool ring = tile.fill == Fill::kRing, windows = tile.fill == Fill::kWindows;

  const StageLayout& layout = args.layout;
  const Shared<float> s(args.s, Sizes::kSums * (tiling.places + kPlaneGap));
  const Shared<uint32_t> entry(args.entry, kMaxRows);
  const auto x_of = [&](int i) { return Shared<char>(args.x_at + i * args.x_bytes, args.x_bytes); };
  const BankCopies copies = copies_of(layout, args.bank);
  const int row_places =
      ring ? static_cast<int>(args.bank.slots) : tile.rows;  // places, of no windows
  const XCopy x_copy_of = x_copy<Math, BATCH>(args, m0);
  // Copies of column b to stage i, in a group of their own even where there are none. Here and
  // below PLAIN leaves out what the most common tiles (stage.h) do not need.
  const auto begin = [&](auto plain, int b, int i) {
    constexpr bool kPlain = decltype(plain)::value;
    if (b < end) {
      const Stage stage = stage_of(layout, tiling, i);
      if (kPlain || windows) {
        const ColumnReads column = column_of(layout.columns, b - first);
        fill_windows<kPlain>(layer, layout, args.bank, column, copies, stage);
      } else if (!ring) {
        fill_rows(layout, args.bank, tile, copies, stage);
      } else if (b == first) {
        fill_ring(layout, args.bank, stage);
      }
      fill_x<Math, BATCH, kPlain>(args, x_copy_of, m0, b, x_of(i));
    }
    commit_copies();
  };
  constexpr Entries kEntries = BATCH == 1 ? Entries::kSpread : Entries::kPlaces;
  const EntryLane lane = lane_of(layer.law, kEntries);
  const int unfinished = kept(unfinished_from(layer));
  [[maybe_unused]] const auto product = product_lane<Math, BATCH>(args);
  float y[Sizes::kRows][BATCH] = {};
  // Rows behind the tile's read the first place, and are not written.
  for (int i = tile.rows + thread(); i < kMaxRows; i += kThreads) entry[i] = 0;
  if (windows) prepare_first<kEntries>(layer, tile, layout.columns, range);
  for (int i = 0; i < layout.depth; ++i) {
    if (tile.fill == Fill::kGather && first + i < end) {
      prepare_rows(layer, tile, first + i, stage_of(layout, tiling, i));
    }
  }
  sync();
  for (int i = 0; i < layout.depth - 1; ++i) begin(AnyTiles{}, first + i, i);
  const auto columns = [&](auto plain) {
    constexpr bool kPlain = decltype(plain)::value;
    const int depth = kPlain ? kStages : layout.depth;
    int current = 0;  // stage of column b
    RPG_LOOP
    for (int b = first; b < end; ++b, current = stage_after(depth, current, 1)) {
      wait_stage(depth);
      sync();
      begin(plain, b + depth - 1, stage_after(depth, current, depth - 1));
      const Stage stage = stage_of(layout, tiling, current);
      const ColumnReads column = column_of(layout.columns, b - first);
      const int used = kPlain ? 256 : windows ? places_of(layer, column) : row_places;
      if (b >= unfinished) sign_and_clear<Number>(layer, tile, used, b, stage);
      if (kPlain || windows) {
        window_entries<kPlain>(layer, tile, column, lane, entry);
      } else {
        row_entries<kEntries>(layer, tile, b, stage, entry);
      }
      if constexpr (Math::kTensorCores) {
        products_mma<Math, BATCH, kPlain>(args, product, used, stage, x_of(current), s);
      } else {
        products_fma<BATCH>(args, used, stage, x_of(current), s);
      }
      sync();
      if (kPlain || windows) {
        prepare_next<kEntries>(layer, tile, layout.columns, range, b - first);
      } else if (!ring && b + depth < end) {
        prepare_rows(layer, tile, b + depth, stage);
      }
      RPG_UNROLL
      for (int k = 0; k < Sizes::kRows; ++k) {
        if (!kPlain && k * kThreads >= tile.rows) break;
        const uint32_t row_entry = entry[thread() + k * kThreads];
        const int place = static_cast<int>(row_entry & 0x7FFFFFFF);
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
  };
  if constexpr (Math::kTensorCores) {
    if (args.x_aligned && plain_tile(layer, tiling, layout, tile)) {
      columns(PlainTiles{});
    } else {
      columns(AnyTiles{});
    }
  } else {
    columns(AnyTiles{});
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
  const LinearSharedPlan shared =
      shared_plan(kernel_args.layer, kernel_args.tiling, kernel_args.bank.row_bytes,
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

Plan plan_linear(const LayerLaw& law, Dtype dtype, int64_t batch, int64_t columns,
                 const Device& device) {
  const int block = law.granularity, size = element_bytes(dtype);
  const Layer layer = layer_of(law, columns);
  const bool tensor_cores = dtype != Dtype::kFloat32;
  const auto bytes = [&](const Tiling& tiling, int batch_tile) {
    const int x_bytes = batch_tile * block * size, sums = batch_tile == 1 ? 4 : batch_tile;
    return shared_plan(layer, tiling, block * size, x_bytes, sums).bytes;
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
