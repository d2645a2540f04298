// linear_input_grad: dx [batch, K] = scale · dy [batch, N] · (G ring), Ŵ = G ring never in memory.
//
//   T[place, m]   += ± dy[n, m]                       for the rows n that read a place
//   dx[m, column]  = Σ_place T[place, m] block(place)  once for each place
//
// the adjoint of linear.cu, and cut in the same way: tiles of rows x splits of the columns x tiles
// of the batch, 256 threads. The tile's dy stays in registers, kRows · BATCH of a thread. Rows that
// read one window in one lap read different places, so a lap's terms are added without atomics,
// with a barrier between laps: the order of additions is that of the law. Rows of a ring that fits
// have no such order: there T is row by row. Sums of tiles go through the workspace; the last block
// of a split adds them in order.
//
// Shared memory: stages (stage.h), T (places · BATCH · 4), entries, sums of parts. Instructions for
// a row and a column, 64 weights, as compiled for sm_90a (docs/cuda.md): 100 for the entry, 47 at
// batch 1 and 92 at 16 for T, 139 and 600 for products, which use no tensor cores.
// Predicted on an H200, 14336x4096, bf16, windows 256 x 4: bound by them, 20 us at batch 1 and 42
// at 16.

#include <stdexcept>

#include "entries.h"
#include "linear.h"
#include "plan.h"

namespace rpg::RPG_DEVICE {

namespace {

struct InputGradKernelArgs {
  Layer layer;
  Tiling tiling;
  Bank bank;
  const void* dy;      // [batch, N]
  void* dx;            // [batch, K]
  float* partial;      // [tiles, batch, K]
  unsigned* counters;  // [batch tiles, splits]
  float scale;
  int batch;
  int splits;
};

// How many rows of x at a time.
template <int BATCH>
struct Lanes {
  static constexpr int kRows = BATCH <= 16 ? 4 : 2;  // of a thread
  static constexpr int kOf = BATCH == 1 ? 1 : 4;     // of a vector of T
  static constexpr int kPlanes = BATCH / kOf;
};

// Where things are in shared memory, behind the stages.
struct SharedPlan {
  int t, entry, sums, last, bytes;
};

// From the sums of a row of dx's even elements to those of its odd ones, which are read together:
// on different banks.
constexpr int kPitch = kThreads + 16;

// T holds places, or rows where the ring is whole.
RPG_LAW int terms_of(const Tiling& tiling) {
  return tiling.fill == Fill::kRing ? tiling.rows : tiling.places;
}

RPG_LAW SharedPlan shared_plan(const Tiling& tiling, int row_bytes, int batch_tile) {
  SharedPlan out{};
  out.t = stage_bytes(tiling, row_bytes).end;
  out.entry = out.t + 4 * batch_tile * terms_of(tiling);
  out.sums = out.entry + 4 * kMaxRows;
  out.last = out.sums + 4 * 2 * kPitch * batch_tile;
  out.bytes = out.last + 16;
  return out;
}

template <int BATCH>
RPG_FUNCTION int t_at(int plane, int term, int terms) {
  return (plane * terms + term) * Lanes<BATCH>::kOf;
}

// T of column b, from entries and dy; ends with a barrier.
template <int BATCH>
RPG_FUNCTION void add_terms(const Layer& layer, const Tile& tile, int terms,
                            const Shared<uint32_t>& entry,
                            const float (&dy)[Lanes<BATCH>::kRows][BATCH], const Shared<float>& t) {
  using L = Lanes<BATCH>;
  const int laps = laps_of(layer.law, tile);
  RPG_LOOP
  for (int lap = 0; lap < laps; ++lap) {
    RPG_UNROLL
    for (int k = 0; k < L::kRows; ++k) {
      const int i = thread() + k * kThreads;
      if (i >= tile.rows || lap_of(entry[i]) != lap) continue;
      const float sign = sign_of(entry[i]);
      const int term = tile.fill == Fill::kRing ? i : place_of(entry[i]);
      RPG_UNROLL
      for (int plane = 0; plane < L::kPlanes; ++plane) {
        float* const at = t.at(t_at<BATCH>(plane, term, terms), L::kOf);
        auto v = load<Vector<float, L::kOf>>(at);
        RPG_UNROLL
        for (int m = 0; m < L::kOf; ++m) {
          v.of[m] = fused(sign, dy[k][plane * L::kOf + m], v.of[m]);
        }
        store(at, v);
      }
    }
    sync();
  }
}

// Blocks that no row reads become zeros: 0 times what they hold need not be 0. `used` [places] is
// memory of T's size or more.
template <int BATCH>
RPG_FUNCTION void clear_unread(const InputGradKernelArgs& args, const Tile& tile, int places,
                               const Shared<uint32_t>& entry, const Stage& stage,
                               const Shared<float>& used) {
  const int chunks = args.bank.row_bytes / 16;
  RPG_LOOP
  for (int i = thread(); i < places; i += kThreads) used[i] = 0;
  sync();
  RPG_LOOP
  for (int i = thread(); i < tile.rows; i += kThreads) used[place_of(entry[i])] = 1;
  sync();
  RPG_LOOP
  for (int i = thread(); i < places; i += kThreads) {
    if (used[i] != 0) continue;
    for (int c = 0; c < chunks; ++c) stage.blocks[i * chunks + c] = {0, 0, 0, 0};
  }
  sync();
}

// Whether each window of the column is read as a whole.
RPG_FUNCTION bool all_read(const Layer& layer, const Tile& tile, int b, const Stage& stage) {
  if (tile.fill != Fill::kWindows) return true;
  const WindowBand& law = layer.law;
  const uint32_t first = position(tile, b), end = first + tile.rows;
  const uint32_t part = part_of(law, first), segments = segments_of(law, first, tile.rows);
  for (uint32_t i = 0; i < segments; ++i) {
    const uint32_t next = law.head + (part + i) * law.cell;
    const uint32_t begin = i ? next - law.cell : first, stop = next < end ? next : end;
    const uint32_t from = (begin + stage.segments[i].shift) & (law.scramble.window - 1);
    const uint32_t lead = from ? law.scramble.window - from : 0;
    if (stop - begin < lead + law.scramble.window) return false;
  }
  return true;
}

// dx of a pair of elements: this part's share of the terms, [2, BATCH].
template <class T, int BATCH>
RPG_FUNCTION void products(const InputGradKernelArgs& args, const Tile& tile, int terms, int used,
                           const Shared<uint32_t>& entry, const Stage& stage,
                           const Shared<float>& t, float (&sum)[2][BATCH]) {
  using L = Lanes<BATCH>;
  using Bits = typename T::Bits;
  const int pairs = args.layer.block / 2, pair = thread() % pairs, parts = kThreads / pairs;
  constexpr int kPerChunk = 16 / sizeof(Bits);
  const int chunk = 2 * pair / kPerChunk, rest = 2 * pair % kPerChunk;
  const int chunks = args.bank.row_bytes / 16;
  for (int term = thread() / pairs; term < used; term += parts) {
    const int place = tile.fill == Fill::kRing ? place_of(entry[term]) : term;
    const uint4* const at = stage.blocks.at(chunk_at(place, chunk, chunks), 1);
    const auto bits = load<Vector<Bits, 2>>(reinterpret_cast<const Bits*>(at) + rest);
    const float w0 = T::load(bits.of[0]), w1 = T::load(bits.of[1]);
    RPG_UNROLL
    for (int plane = 0; plane < L::kPlanes; ++plane) {
      const auto v = load<Vector<float, L::kOf>>(t.at(t_at<BATCH>(plane, term, terms), L::kOf));
      RPG_UNROLL
      for (int m = 0; m < L::kOf; ++m) {
        sum[0][plane * L::kOf + m] = fused(v.of[m], w0, sum[0][plane * L::kOf + m]);
        sum[1][plane * L::kOf + m] = fused(v.of[m], w1, sum[1][plane * L::kOf + m]);
      }
    }
  }
}

template <class T, int BATCH>
RPG_KERNEL(kThreads, 1)
linear_input_grad_kernel(RPG_ARGS InputGradKernelArgs args) {
  using L = Lanes<BATCH>;
  const Layer& layer = args.layer;
  const Tiling& tiling = args.tiling;
  const Tile tile = tile_at(layer, tiling, block_x());
  const int m0 = block_z() * BATCH;
  const int batch = args.batch - m0 < BATCH ? args.batch - m0 : BATCH;
  const int first = static_cast<int>(int64_t{layer.blocks} * block_y() / args.splits);
  const int end = static_cast<int>(int64_t{layer.blocks} * (block_y() + 1) / args.splits);

  const SharedPlan at = shared_plan(tiling, args.bank.row_bytes, BATCH);
  const int terms = terms_of(tiling);
  const Shared<float> t(at.t, BATCH * terms);
  const Shared<uint32_t> entry(at.entry, kMaxRows);
  const Shared<float> sums(at.sums, 2 * kPitch * BATCH);
  const auto stage_of_column = [&](int b) {
    return stage_of(tiling, args.bank.row_bytes, b - first);
  };
  const auto begin = [&](int b) {
    if (b < end && (tile.fill != Fill::kRing || b == first)) {
      fill(layer, args.bank, tile, b, stage_of_column(b));
    }
    commit_copies();
  };

  RPG_LOOP
  for (int b = first; b < end && b < first + kStages; ++b) {
    prepare(layer, tile, b, stage_of_column(b));
  }
  float dy[L::kRows][BATCH];
  RPG_UNROLL
  for (int k = 0; k < L::kRows; ++k) {
    const int i = thread() + k * kThreads;
    RPG_UNROLL
    for (int m = 0; m < BATCH; ++m) {
      const bool valid = i < tile.rows && m < batch;
      dy[k][m] = valid ? T::load(static_cast<const typename T::Bits*>(
                             args.dy)[int64_t{m0 + m} * layer.rows + tile.row + i])
                       : 0.f;
    }
  }
  sync();
  for (int b = first; b < first + kStages - 1; ++b) begin(b);
  RPG_LOOP
  for (int b = first; b < end; ++b) {
    wait_copies<kStages - 2>();
    sync();
    begin(b + kStages - 1);
    const Stage stage = stage_of_column(b);
    const int places = places_of(layer, args.bank, tile, b);
    const int used = tile.fill == Fill::kRing ? tile.rows : places;
    finish<T>(layer, args.bank, tile, b, stage);
    write_entries(layer, tile, b, stage, entry);
    if (!all_read(layer, tile, b, stage)) {
      clear_unread<BATCH>(args, tile, places, entry, stage, t);
    }
    for (int plane = 0; plane < L::kPlanes; ++plane) {
      RPG_LOOP
      for (int i = thread(); i < used * L::kOf; i += kThreads) {
        t[t_at<BATCH>(plane, 0, terms) + i] = 0.f;
      }
    }
    sync();
    add_terms<BATCH>(layer, tile, terms, entry, dy, t);
    if (b + kStages < end) prepare(layer, tile, b + kStages, stage_of_column(b + kStages));
    float sum[2][BATCH] = {};
    products<T, BATCH>(args, tile, terms, used, entry, stage, t, sum);
    RPG_UNROLL
    for (int m = 0; m < BATCH; ++m) {
      sums[(2 * m) * kPitch + thread()] = sum[0][m];
      sums[(2 * m + 1) * kPitch + thread()] = sum[1][m];
    }
    sync();
    const int pairs = layer.block / 2;
    RPG_LOOP
    for (int i = thread(); i < layer.block * batch; i += kThreads) {
      const int m = i / layer.block, e = i - m * layer.block, column = b * layer.block + e;
      if (column >= layer.columns) continue;
      float total = 0;
      for (int part = 0; part < kThreads / pairs; ++part) {
        total += sums[(2 * m + e % 2) * kPitch + part * pairs + e / 2];
      }
      if (tiling.tiles == 1) {
        static_cast<typename T::Bits*>(args.dx)[int64_t{m0 + m} * layer.columns + column] =
            T::store(total * args.scale);
      } else {
        args.partial[(int64_t{block_x()} * args.batch + m0 + m) * layer.columns + column] = total;
      }
    }
  }
  if (tiling.tiles == 1) return;
  const Shared<int> last(at.last, 1);
  sync();
  if (thread() == 0) {
    last[0] = arrive(args.counters + block_z() * args.splits + block_y(), tiling.tiles);
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
    static_cast<typename T::Bits*>(args.dx)[at_column] = T::store(sum * args.scale);
  }
}

template <class T, int BATCH>
void run(const LayerLaw& law, const Plan& plan, const CudaLinearInputGradArgs& args) {
  InputGradKernelArgs to{};
  to.layer = layer_of(law, args.columns);
  to.tiling = tiling_of(plan);
  to.bank = {args.ring, law.slots, law.granularity * static_cast<int>(sizeof(typename T::Bits))};
  to.dy = args.dy, to.dx = args.dx;
  to.partial = args.workspace, to.counters = args.counters;
  to.scale = static_cast<float>(args.scale);
  to.batch = static_cast<int>(args.batch), to.splits = plan.splits;
  launch(linear_input_grad_kernel<T, BATCH>, {plan.tiles, plan.splits, plan.batch_tiles}, kThreads,
         plan.shared_bytes, args.stream, to);
}

template <class T>
void run_batch(const LayerLaw& law, const Plan& plan, const CudaLinearInputGradArgs& args) {
  switch (plan.batch_tile) {
    case 1: return run<T, 1>(law, plan, args);
    case 8: return run<T, 8>(law, plan, args);
    default: return run<T, 16>(law, plan, args);
  }
}

}  // namespace

Plan plan_linear_input_grad(const LayerLaw& law, Dtype dtype, int64_t batch, int64_t columns,
                            const Device& device) {
  const int row_bytes = law.granularity * element_bytes(dtype);
  const auto bytes = [&](const Tiling& tiling, int batch_tile) {
    return shared_plan(tiling, row_bytes, batch_tile).bytes;
  };
  Plan out = plan_tiles(law, row_bytes, batch, 16, device, bytes);
  if (out.tiles > 1) {
    out.workspace = int64_t{out.tiles} * batch * columns;
    out.counters = out.splits * out.batch_tiles;
  }
  return out;
}

void linear_input_grad(const LayerLaw& law, const Plan& plan, const CudaLinearInputGradArgs& args) {
  switch (args.dtype) {
    case Dtype::kBfloat16: return run_batch<Bfloat16>(law, plan, args);
    case Dtype::kFloat16: return run_batch<Float16>(law, plan, args);
    default: return run_batch<Float32>(law, plan, args);
  }
}

}  // namespace rpg::RPG_DEVICE
