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
  Bank bank;
  const void* x;       // [batch, K]
  const float* bias;   // [N] or null
  void* y;             // [batch, N]
  float* partial;      // [splits, batch, N]
  unsigned* counters;  // [batch tiles, tiles]
  float scale;
  int batch;
  int splits;
  bool x_aligned;  // rows of x begin at multiples of 16 bytes
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
  // S: one float for each place, or planes of 4 rows of x.
  static constexpr int kPlanes = BATCH == 1 ? 1 : BATCH / 4;
  static constexpr int kLanes = BATCH == 1 ? 1 : 4;
  static constexpr int kBytes = sizeof(typename Math::Number::Bits);
  static constexpr int kXRows = Math::kTensorCores && BATCH < 8 ? 8 : BATCH;

  // Bytes of a row of x.
  RPG_LAW int x_pitch(int block) { return block * kBytes + kPad; }
};

// S of one plane: 4 sums of a place, or 1. Four places between planes put two of them, which the
// lanes of a store of products write, on different banks.
constexpr int kBetween = 4;

template <int LANES>
RPG_FUNCTION int s_at(int plane, int place, int places) {
  return (plane * (places + kBetween) + place) * LANES;
}

// Where things are in shared memory, behind the stages.
struct SharedPlan {
  int s, entry, x, last, bytes;
};

RPG_LAW SharedPlan shared_plan(const Tiling& tiling, int row_bytes, int x_bytes, int s_floats) {
  SharedPlan out{};
  out.s = stage_bytes(tiling, row_bytes).end;
  out.entry = out.s + 4 * s_floats * (tiling.places + kBetween);
  out.x = out.entry + 4 * kMaxRows;
  out.last = out.x + kStages * x_bytes;
  out.bytes = out.last + 16;
  return out;
}

// x [rows m0 ..., column b] into shared memory; zeros behind the batch and the end of a row.
template <class Math, int BATCH>
RPG_FUNCTION void fill_x(const LinearKernelArgs& args, int m0, int b, const Shared<char>& to) {
  using Bits = typename Math::Number::Bits;
  using S = Shape<Math, BATCH>;
  const int block = args.layer.block, pitch = S::x_pitch(block), columns = args.layer.columns;
  const int column = b * block;
  const Bits* const x = static_cast<const Bits*>(args.x);
  if (args.x_aligned) {
    constexpr int kPerChunk = 16 / S::kBytes;
    const int chunks = block / kPerChunk;
    RPG_LOOP
    for (int i = thread(); i < S::kXRows * chunks; i += kThreads) {
      const int m = i / chunks, c = i - m * chunks;
      const bool valid = m0 + m < args.batch && column + c * kPerChunk < columns;
      const Bits* from = x + (valid ? int64_t{m0 + m} * columns + column + c * kPerChunk : 0);
      copy_async(to.at(m * pitch + 16 * c, 16), from, valid);
    }
    return;
  }
  RPG_LOOP
  for (int i = thread(); i < S::kXRows * block; i += kThreads) {
    const int m = i / block, e = i - m * block;
    const bool valid = m0 + m < args.batch && column + e < columns;
    *reinterpret_cast<Bits*>(to.at(m * pitch + e * S::kBytes, S::kBytes)) =
        valid ? x[int64_t{m0 + m} * columns + column + e] : Bits{0};
  }
}

// S = blocks · xᵀ by tensor cores: a warp takes 16 places, all of the batch.
template <class Math, int BATCH>
RPG_FUNCTION void products_mma(const LinearKernelArgs& args, int used, const Stage& stage,
                               const Shared<char>& x, const Shared<float>& s) {
  using Sh = Shape<Math, BATCH>;
  constexpr int kTiles = Sh::kXRows / 8;
  const int block = args.layer.block, chunks = block / 8, places = args.tiling.places;
  const int lane = thread() % kWarp, g = lane / 4, t = lane % 4;
  const int pitch = Sh::x_pitch(block);
  RPG_LOOP
  for (int first = thread() / kWarp * 16; first < used; first += kWarps * 16) {
    float c[kTiles][4] = {};
    RPG_LOOP
    for (int k = 0; k < block / 16; ++k) {
      uint32_t a[4];
      // Lanes 0 to 15 give rows 0 to 15 of the first 8 elements, the others of the next 8.
      const int place = first + lane % 16;
      load_matrices(a, stage.blocks.at(chunk_at(place, 2 * k + lane / 16, chunks), 1));
      RPG_UNROLL
      for (int n = 0; n < kTiles; ++n) {
        uint32_t b[2];
        b[0] = load<uint32_t>(x.at((8 * n + g) * pitch + 32 * k + 4 * t, 4));
        b[1] = load<uint32_t>(x.at((8 * n + g) * pitch + 32 * k + 16 + 4 * t, 4));
        multiply(Math{}, {c[n], a, b});
      }
    }
    RPG_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      RPG_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int place = first + g + 8 * half, m = 8 * n + 2 * t;
        if (m >= BATCH || place >= used) continue;
        if (BATCH == 1) {
          s[place] = c[n][2 * half];
        } else {
          store(s.at(s_at<4>(m / 4, place, places) + m % 4, 2),
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
    RPG_UNROLL
    for (int plane = 0; plane < Sh::kPlanes; ++plane) {
      Vector<float, Sh::kLanes> v;
      RPG_UNROLL
      for (int m = 0; m < Sh::kLanes; ++m) v.of[m] = sum[plane * Sh::kLanes + m];
      store(s.at(s_at<Sh::kLanes>(plane, place, args.tiling.places), Sh::kLanes), v);
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
  const bool ring = tile.fill == Fill::kRing;

  const int x_bytes = Sh::kXRows * Sh::x_pitch(layer.block);
  const SharedPlan at = shared_plan(tiling, args.bank.row_bytes, x_bytes, Sh::kPlanes * Sh::kLanes);
  const Shared<float> s(at.s, Sh::kPlanes * Sh::kLanes * (tiling.places + kBetween));
  const Shared<uint32_t> entry(at.entry, kMaxRows);
  const auto stage_of_column = [&](int b) {
    return stage_of(tiling, args.bank.row_bytes, b - first);
  };
  const auto x_of = [&](int b) {
    return Shared<char>(at.x + (b - first) % kStages * x_bytes, x_bytes);
  };
  // Copies of column b, in a group of their own even where there are none.
  const auto begin = [&](int b) {
    if (b < end) {
      if (!ring || b == first) fill(layer, args.bank, tile, b, stage_of_column(b));
      fill_x<Math, BATCH>(args, m0, b, x_of(b));
    }
    commit_copies();
  };

  float y[Sh::kRows][BATCH] = {};
  RPG_LOOP
  for (int b = first; b < end && b < first + kStages; ++b)
    prepare(layer, tile, b, stage_of_column(b));
  sync();
  for (int b = first; b < first + kStages - 1; ++b) begin(b);
  RPG_LOOP
  for (int b = first; b < end; ++b) {
    wait_copies<kStages - 2>();
    sync();
    begin(b + kStages - 1);
    const Stage stage = stage_of_column(b);
    const int used = places_of(layer, args.bank, tile, b);
    finish<Number>(layer, args.bank, tile, b, stage);
    write_entries(layer, tile, b, stage, entry);
    if constexpr (Math::kTensorCores) {
      products_mma<Math, BATCH>(args, used, stage, x_of(b), s);
    } else {
      products_fma<BATCH>(args, used, stage, x_of(b), s);
    }
    sync();
    if (b + kStages < end) prepare(layer, tile, b + kStages, stage_of_column(b + kStages));
    RPG_UNROLL
    for (int k = 0; k < Sh::kRows; ++k) {
      const int i = thread() + k * kThreads;
      if (i >= tile.rows) continue;
      const float sign = sign_of(entry[i]);
      const int place = place_of(entry[i]);
      RPG_UNROLL
      for (int plane = 0; plane < Sh::kPlanes; ++plane) {
        const auto v = load<Vector<float, Sh::kLanes>>(
            s.at(s_at<Sh::kLanes>(plane, place, tiling.places), Sh::kLanes));
        RPG_UNROLL
        for (int m = 0; m < Sh::kLanes; ++m) {
          float& to = y[k][plane * Sh::kLanes + m];
          to = fused(sign, v.of[m], to);
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
  const Shared<int> last(at.last, 1);
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
  to.bank = {args.ring, law.slots, law.granularity * Sh::kBytes};
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

Plan plan_linear(const LayerLaw& law, Dtype dtype, int64_t batch, int64_t, const Device& device) {
  const int block = law.granularity, size = element_bytes(dtype);
  const bool tensor_cores = dtype != Dtype::kFloat32;
  const auto bytes = [&](const Tiling& tiling, int batch_tile) {
    const int x_rows = tensor_cores && batch_tile < 8 ? 8 : batch_tile;
    return shared_plan(tiling, block * size, x_rows * (block * size + kPad), batch_tile).bytes;
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
