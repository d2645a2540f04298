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
// Grid: tiles of rows x splits of the columns x tiles of the batch; 256 threads, each with
// kRows rows of y and BATCH sums for each in registers. A block goes from column to column: wait
// for the stage, begin the copies of the one after the next, entries, products, barrier, sums.
// Sums of splits go through the workspace; the last block of a tile adds them in order, so results
// do not depend on who is last.
//
// Shared memory: stages · places · block (3 · 32 KB for windows of 256 slots of 64 bf16 and 4
// laps), S (places · BATCH · 4), tiles of x. Accesses of 16 bytes by 8 neighbouring threads fall on
// different banks: rows of a window by the exchange of chunks (stage.h), S by the residues of the
// window law. Bytes from global memory for a column of a tile: its windows, once.
//
// Instructions for a row and a column, 64 weights, as compiled for sm_90a (docs/cuda.md): 105 for
// the entry, 12 to 31 for sums, 44 to 55 for products, 45 for copies, 70 to 80 around them.
// Predicted on an H200, 14336x4096, bf16, windows 256 x 4, batch 1: bound by them, 14 us; 29 MB of
// windows at 5.5 TB/s from the second-level cache, 5.2 us, beside it.

#include <stdexcept>

#include "entries.h"
#include "linear.h"
#include "plan.h"

namespace rpg::RPG_DEVICE {

namespace {

constexpr int kPad = 16;  // bytes behind a row of x, so that rows begin on different banks

struct LinearKernelArgs {
  Layer layer;
  Tiling tiling;
  Layout layout;
  Bank bank;
  const void* x;       // [batch, K]
  const float* bias;   // [N] or null
  void* y;             // [batch, N]
  float* partial;      // [splits, batch, N]
  unsigned* counters;  // [batch tiles, tiles]
  float scale;
  int batch;
  int splits;
  bool x_aligned;                     // rows of x begin at multiples of 16 bytes
  int s, entry, x_at, x_bytes, last;  // in shared memory: shared_plan
};

// 16-bit elements by tensor cores.
template <class T>
struct Mma {
  using Number = T;
  static constexpr bool kTensorCores = true;
};
// fp32 elements by fused multiply-add.
struct Fma {
  using Number = Float32;
  static constexpr bool kTensorCores = false;
};

RPG_FUNCTION void multiply(Mma<Bfloat16>, const MultiplyArgs& args) { multiply_bfloat16(args); }
RPG_FUNCTION void multiply(Mma<Float16>, const MultiplyArgs& args) { multiply_float16(args); }

template <class Math, int BATCH>
struct Shape {
  static constexpr int kRows = BATCH <= 16 ? 4 : 2;  // of a thread
  static constexpr int kPlanes = BATCH / 4;          // of S, from batch 8 on: of 4 rows of x
  static constexpr int kBytes = sizeof(typename Math::Number::Bits);
  // Floats of a place in S: at batch 1 there are four copies, see entries.h.
  static constexpr int kSums = BATCH == 1 ? 4 : BATCH;
  static constexpr int kTiles = (BATCH + 7) / 8;  // of 8 rows of x, for tensor cores

  // Bytes of a row of x.
  RPG_LAW int x_pitch(int block) { return block * kBytes + kPad; }
};

// S of one plane: 4 sums of a place. Four places between planes put two of them, which the
// lanes of a store of products write, on different banks.
constexpr int kBetween = 4;

RPG_FUNCTION int s_at(int plane, int place, int places) {
  return (plane * (places + kBetween) + place) * 4;
}

// Where things are in shared memory, behind the stages.
struct SharedPlan {
  Layout layout;
  int s, entry, x, last, bytes;
};

RPG_HOST SharedPlan shared_plan(const Layer& layer, const Tiling& tiling, int row_bytes,
                                int x_bytes, int s_floats) {
  SharedPlan out{};
  out.layout = layout_of(layer, tiling, row_bytes);
  out.s = out.layout.end;
  out.entry = out.s + 4 * s_floats * (tiling.places + kBetween);
  out.x = out.entry + 4 * kMaxRows;
  out.last = out.x + kStages * x_bytes;
  out.bytes = out.last + 16;
  return out;
}

// This thread's 16 bytes of a column of x: its rows have no more of them than there are threads.
struct XCopy {
  const char* from;  // of column 0
  int to;            // in shared memory
  int end;           // columns b < end have them; in all others they are zeros
  bool any;
};

template <class Math, int BATCH>
RPG_FUNCTION XCopy x_copy(const LinearKernelArgs& args, int m0) {
  using S = Shape<Math, BATCH>;
  static_assert(BATCH * 64 * S::kBytes / 16 <= kThreads, "16 bytes of x for a thread");
  const int log = args.layout.log_chunks, m = thread() >> log;
  const int c = thread() & ((1 << log) - 1), e = c * (16 / S::kBytes), block = args.layer.block;
  const bool any = args.x_aligned && m < BATCH, row = any && m0 + m < args.batch;
  const int end = row ? (args.layer.columns - e + block - 1) / block : 0;
  const int64_t from = row ? int64_t{m0 + m} * args.layer.columns + e : 0;
  return {kept(static_cast<const char*>(args.x) + from * S::kBytes),
          kept(m * S::x_pitch(block) + 16 * c), kept(end), any};
}

// x [rows m0 ..., column b] into shared memory; zeros behind the batch and the end of a row.
template <class Math, int BATCH>
RPG_FUNCTION void fill_x(const LinearKernelArgs& args, const XCopy& copy, int m0, int b,
                         const Shared<char>& to) {
  using Bits = typename Math::Number::Bits;
  using S = Shape<Math, BATCH>;
  if (copy.any) {
    const bool valid = b < copy.end;
    const uint32_t at = valid ? b : 0;
    copy_async(to.at(copy.to, 16), copy.from + uint64_t{at} * args.bank.row_bytes, valid);
  }
  if (args.x_aligned) return;
  const int block = args.layer.block, columns = args.layer.columns, column = b * block;
  const Bits* const x = static_cast<const Bits*>(args.x);
  RPG_LOOP
  for (int i = thread(); i < BATCH * block; i += kThreads) {
    const int m = i / block, e = i - m * block;
    const bool valid = m0 + m < args.batch && column + e < columns;
    *reinterpret_cast<Bits*>(to.at(m * S::x_pitch(block) + e * S::kBytes, S::kBytes)) =
        valid ? x[int64_t{m0 + m} * columns + column + e] : Bits{0};
  }
}

// What a lane reads and writes in all products: chunks of the first block of a warp's 16, for four
// steps of 16 elements; bytes of x; sums of place g, or of g + 8 behind it, of rows 8 n + 2 t and
// the next, or at batch 1 copy t.
template <int TILES>
struct ProductLane {
  int at[4], x, to[TILES];
};

template <class Math, int BATCH>
RPG_FUNCTION auto product_lane(const LinearKernelArgs& args) {
  using Sh = Shape<Math, BATCH>;
  ProductLane<Sh::kTiles> out;
  const int lane = thread() % kWarp, g = lane / 4, t = lane % 4;
  const int block = args.layer.block, chunks = block / 8;
  // Lanes 0 to 15 give rows 0 to 15 of the first 8 elements of a step, the others of the next 8.
  const int row = lane % 16 * chunks, swap = chunk_at(lane % 16, lane / 16, chunks) - row;
  RPG_UNROLL
  for (int k = 0; k < 4; ++k) out.at[k] = kept(row + (swap ^ 2 * k));
  // At batch 1 all 8 columns of the product are those of one row.
  out.x = kept((BATCH == 1 ? 0 : lane % 8 * Sh::x_pitch(block)) + 16 * (lane / 8));
  RPG_UNROLL
  for (int n = 0; n < Sh::kTiles; ++n) {
    const int place = s_at(2 * n + t / 2, g, args.tiling.places) + 2 * (t % 2);
    out.to[n] = kept(BATCH == 1 ? 8 * t + g : place);
  }
  return out;
}

// S = blocks · xᵀ by tensor cores: a warp takes 16 places, all of the batch. What lies behind
// `used` places is multiplied up to a multiple of 16, and never read.
template <class Math, int BATCH, class ProductLane>
RPG_FUNCTION void products_mma(const LinearKernelArgs& args, const ProductLane& lane, int used,
                               const Stage& stage, const Shared<char>& x, const Shared<float>& s) {
  using Sh = Shape<Math, BATCH>;
  constexpr int kTiles = Sh::kTiles;
  const int block = args.layer.block, chunks = block / 8;
  // Elements 32 half ... of x: [tile][half], fragments of two steps of 16.
  uint32_t b[kTiles][2][4];
  RPG_UNROLL
  for (int n = 0; n < kTiles; ++n) {
    load_matrices(b[n][0], x.at(lane.x + 8 * n * Sh::x_pitch(block), 16));
    if (block == 64) load_matrices(b[n][1], x.at(lane.x + 8 * n * Sh::x_pitch(block) + 64, 16));
  }
  RPG_LOOP
  for (int first = thread() / kWarp * 16; first < used; first += kWarps * 16) {
    const Shared<uint4> blocks = stage.blocks.from(first * chunks);
    const Shared<float> sums = s.from(4 * first);
    float c[kTiles][4] = {};
    const auto step = [&](int k) {
      uint32_t a[4];
      load_matrices(a, blocks.at(lane.at[k], 1));
      RPG_UNROLL
      for (int n = 0; n < kTiles; ++n) multiply(Math{}, {c[n], a, b[n][k / 2] + 2 * (k % 2)});
    };
    step(0);
    step(1);
    if (block == 64) {
      step(2);
      step(3);
    }
    RPG_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      RPG_UNROLL
      for (int half = 0; half < 2; ++half) {
        if constexpr (BATCH == 1) {
          sums[lane.to[n] + 32 * half] = c[n][2 * half];
        } else {
          store(sums.at(lane.to[n] + 32 * half, 2),
                Vector<float, 2>{{c[n][2 * half], c[n][2 * half + 1]}});
        }
      }
    }
  }
}

// The same in fp32: a thread takes a place.
template <int BATCH>
RPG_FUNCTION void products_fma(const LinearKernelArgs& args, int used, const Stage& stage,
                               const Shared<char>& x, const Shared<float>& s) {
  using Sh = Shape<Fma, BATCH>;
  const int chunks = args.layer.block / 4, pitch = Sh::x_pitch(args.layer.block);
  RPG_LOOP
  for (int place = thread(); place < used; place += kThreads) {
    float sum[BATCH] = {};
    for (int c = 0; c < chunks; ++c) {
      const auto w = load<Vector<float, 4>>(stage.blocks.at(chunk_at(place, c, chunks), 1));
      RPG_UNROLL
      for (int m = 0; m < BATCH; ++m) {
        const auto v = load<Vector<float, 4>>(x.at(m * pitch + 16 * c, 16));
        RPG_UNROLL
        for (int e = 0; e < 4; ++e) sum[m] = fused(w.of[e], v.of[e], sum[m]);
      }
    }
    if constexpr (BATCH == 1) {
      RPG_UNROLL
      for (int i = 0; i < 4; ++i) {
        s[spread_place(place, thread() / 8 + i)] = sum[0];
      }
    } else {
      RPG_UNROLL
      for (int plane = 0; plane < Sh::kPlanes; ++plane) {
        Vector<float, 4> v;
        RPG_UNROLL
        for (int m = 0; m < 4; ++m) v.of[m] = sum[4 * plane + m];
        store(s.at(s_at(plane, place, args.tiling.places), 4), v);
      }
    }
  }
}

// y[m, n] from its sum.
template <class T>
RPG_FUNCTION void write(const LinearKernelArgs& args, int m, int n, float sum) {
  sum *= args.scale;
  if (args.bias) sum += args.bias[n];
  static_cast<typename T::Bits*>(args.y)[int64_t{m} * args.layer.rows + n] = T::store(sum);
}

template <class Math, int BATCH>
RPG_KERNEL(kThreads, 1)
linear_kernel(RPG_ARGS LinearKernelArgs args) {
  using Sh = Shape<Math, BATCH>;
  using Number = typename Math::Number;
  const Layer& layer = args.layer;
  const Tiling& tiling = args.tiling;
  const Tile tile = tile_at(layer, tiling, block_x());
  const int m0 = block_z() * BATCH;
  const int first = static_cast<int>(int64_t{layer.blocks} * block_y() / args.splits);
  const int end = static_cast<int>(int64_t{layer.blocks} * (block_y() + 1) / args.splits);
  const Range range{first, end};
  const bool ring = tile.fill == Fill::kRing, windows = tile.fill == Fill::kWindows;

  const Layout& layout = args.layout;
  const Shared<float> s(args.s, Sh::kSums * (tiling.places + kBetween));
  const Shared<uint32_t> entry(args.entry, kMaxRows);
  const auto x_of = [&](int i) { return Shared<char>(args.x_at + i * args.x_bytes, args.x_bytes); };
  const Copies copies = copies_of(layout, args.bank);
  const int others = ring ? static_cast<int>(args.bank.slots) : tile.rows;  // places, of no windows
  const XCopy x_copy_of = x_copy<Math, BATCH>(args, m0);
  // Copies of column b to stage i, in a group of their own even where there are none.
  const auto begin = [&](int b, int i) {
    if (b < end) {
      const Stage stage = stage_of(layout, tiling, i);
      if (windows) {
        fill_windows(layer, layout, args.bank, column_of(layout.columns, b - first), copies, stage);
      } else if (!ring || b == first) {
        fill_places(layout, args.bank, tile, others, stage);
      }
      fill_x<Math, BATCH>(args, x_copy_of, m0, b, x_of(i));
    }
    commit_copies();
  };
  constexpr Entries kEntries = BATCH == 1 ? Entries::kSpread : Entries::kPlaces;
  const Lane lane = lane_of(layer.law, kEntries);
  const int unfinished = kept(unfinished_from(layer));
  [[maybe_unused]] const auto product = product_lane<Math, BATCH>(args);
  float y[Sh::kRows][BATCH] = {};
  // Rows behind the tile's read the first place, and are not written.
  for (int i = tile.rows + thread(); i < kMaxRows; i += kThreads) entry[i] = 0;
  if (windows) prepare_first<kEntries>(layer, tile, layout.columns, range);
  for (int i = 0; i < kStages; ++i) {
    if (tile.fill == Fill::kGather && first + i < end) {
      prepare_rows(layer, tile, first + i, stage_of(layout, tiling, i));
    }
  }
  sync();
  for (int i = 0; i < kStages - 1; ++i) begin(first + i, i);
  int now = 0;  // stage of column b
  RPG_LOOP
  for (int b = first; b < end; ++b, now = stage_after(now, 1)) {
    wait_copies<kStages - 2>();
    sync();
    begin(b + kStages - 1, stage_after(now, kStages - 1));
    const Stage stage = stage_of(layout, tiling, now);
    const Column column = column_of(layout.columns, b - first);
    const int used = windows ? places_of(layer, column) : others;
    if (b >= unfinished) finish<Number>(layer, tile, used, b, stage);
    if (windows) {
      window_entries(layer, tile, column, lane, entry);
    } else {
      row_entries<kEntries>(layer, tile, b, stage, entry);
    }
    if constexpr (Math::kTensorCores) {
      products_mma<Math, BATCH>(args, product, used, stage, x_of(now), s);
    } else {
      products_fma<BATCH>(args, used, stage, x_of(now), s);
    }
    sync();
    if (tile.fill == Fill::kGather && b + kStages < end) {
      prepare_rows(layer, tile, b + kStages, stage);
    }
    if (windows) prepare_next<kEntries>(layer, tile, layout.columns, range, b - first);
    RPG_UNROLL
    for (int k = 0; k < Sh::kRows; ++k) {
      if (k * kThreads >= tile.rows) break;
      const uint32_t at = entry[thread() + k * kThreads];
      const int place = static_cast<int>(at & 0x7FFFFFFF);
      if (BATCH == 1) {
        y[k][0] += as_float(as_bits(s[place]) ^ (at & 0x80000000u));
      }
      const float sign = sign_of(at);
      RPG_UNROLL
      for (int plane = 0; plane < Sh::kPlanes; ++plane) {
        const auto v = load<Vector<float, 4>>(s.at(s_at(plane, place, tiling.places), 4));
        RPG_UNROLL
        for (int m = 0; m < 4; ++m) {
          y[k][4 * plane + m] = fused(sign, v.of[m], y[k][4 * plane + m]);
        }
      }
    }
  }

  const int batch = args.batch - m0 < BATCH ? args.batch - m0 : BATCH;
  RPG_UNROLL
  for (int k = 0; k < Sh::kRows; ++k) {
    const int i = thread() + k * kThreads, n = tile.row + i;
    if (i >= tile.rows) continue;
    RPG_UNROLL
    for (int m = 0; m < BATCH; ++m) {
      if (m >= batch) continue;
      if (args.splits == 1) {
        write<Number>(args, m0 + m, n, y[k][m]);
      } else {
        args.partial[(int64_t{block_y()} * args.batch + m0 + m) * layer.rows + n] = y[k][m];
      }
    }
  }
  if (args.splits == 1) return;
  const Shared<int> last(args.last, 1);
  sync();
  if (thread() == 0) {
    last[0] = arrive(args.counters + block_z() * tiling.tiles + block_x(), args.splits);
  }
  sync();
  if (!last[0]) return;
  RPG_LOOP
  for (int i = thread(); i < tile.rows * batch; i += kThreads) {
    const int m = i / tile.rows, n = tile.row + i - m * tile.rows;
    const float* from = args.partial + int64_t{m0 + m} * layer.rows + n;
    float sum = 0;
    for (int split = 0; split < args.splits; ++split) {
      sum += from[int64_t{split} * args.batch * layer.rows];
    }
    write<Number>(args, m0 + m, n, sum);
  }
}

template <class Math, int BATCH>
void run(const LayerLaw& law, const Plan& plan, const CudaLinearArgs& args) {
  using Sh = Shape<Math, BATCH>;
  LinearKernelArgs to{};
  to.layer = layer_of(law, args.columns);
  to.tiling = tiling_of(plan);
  to.bank = bank_of(args.ring, law.slots, law.granularity * Sh::kBytes);
  to.x_bytes = BATCH * Sh::x_pitch(law.granularity);
  const SharedPlan at = shared_plan(to.layer, to.tiling, to.bank.row_bytes, to.x_bytes, Sh::kSums);
  to.layout = at.layout, to.s = at.s, to.entry = at.entry, to.x_at = at.x, to.last = at.last;
  to.x = args.x, to.bias = args.bias, to.y = args.y;
  to.partial = args.workspace, to.counters = args.counters;
  to.scale = static_cast<float>(args.scale);
  to.batch = static_cast<int>(args.batch), to.splits = plan.splits;
  to.x_aligned =
      reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && args.columns * Sh::kBytes % 16 == 0;
  launch(linear_kernel<Math, BATCH>, {plan.tiles, plan.splits, plan.batch_tiles}, kThreads,
         plan.shared_bytes, args.stream, to);
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
    const int x_bytes = batch_tile * (block * size + kPad), sums = batch_tile == 1 ? 4 : batch_tile;
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
