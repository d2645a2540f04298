// linear: y [batch, N] = scale · x [batch, K] · (G ring)ᵀ + bias, Ŵ = G ring never in memory.
//
// The rows of a column of blocks that read the same stored block need the same product with x:
//
//   S[place, m] = block(place) · x[m, column]     once for each place of the column's stage
//   y[n, m]    += ± S[place(n), m]                 one addition for each row
//
// so tensor cores (fp32: fused multiply-adds) multiply what a window holds, not what its `laps`
// rows make of it. Shared memory is read at random in S: 4 bytes for each row of x, and no blocks.
//
// Grid: tiles of up to 1024 rows x splits of the columns x tiles of the batch; 256 threads, each
// with 4 rows of y and BATCH sums for each in registers. columns.h has the way from column to
// column; in each: a barrier, after which nobody reads the S before, entries and products, a
// barrier, sums. Those of splits go through the workspace; the last CTA of a tile adds them in
// order.
//
// Shared memory, and where it is for windows of 256 slots of 64 bfloat16 at batch 16:
//
//   from byte | bytes  | what                | layout
//   ----------|--------|---------------------|--------------------------------------------
//           0 | 98,304 | blocks of 3 stages  | [stage][place][chunk of 16 bytes, exchanged]
//      98,304 |  2,560 | units of columns    | [32] of 80 bytes, in windows
//           - |      - | slots of stages     | [stage][row] of 4 bytes, of gathered blocks
//     100,864 | 16,640 | S                   | [4 planes][256 + 4 places][4 rows of x] fp32
//             |        |                     | batch 1: [256 / 8 octets][4 copies][8 places]
//     117,504 |  4,096 | entries             | [1024 rows]
//     121,600 |  6,144 | columns of x        | [stage][m][chunk of 16 bytes, exchanged]
//     127,744 |     16 | is this CTA last?   |
//
// Accesses of 16 bytes by 8 neighbouring threads fall on different banks: rows of a window by the
// exchange of chunks, S by the residues of the unit law. Bytes from global memory for a column, CTA
// and tile of the batch: its window, and `block` elements of BATCH rows of x. Budget in 16 bits up
// to batch 16: 2.5 lane-instructions for an element of Ŵ, 0.85 of them for entries (docs/cuda.md).

#include "cuda/columns.h"

namespace rpg::RPG_DEVICE {

namespace {

constexpr int kRows = kMaxRows / kThreads;  // of a thread
template <int BATCH>
constexpr int kFragments = (BATCH + 7) / 8;  // of 8 rows of x, for tensor cores

// Where things are in shared memory, in bytes.
struct ForwardLayout {
  StageLayout stages;
  int s, entry, x, x_bytes, last, bytes;  // x_bytes are those of a stage
};

struct LinearKernelArgs {
  Layer layer;
  Plan plan;
  ForwardLayout layout;
  CudaLinearArgs call;
  bool x_aligned;  // rows of x begin at multiples of 16 bytes
};

// The two planes that one store of products writes begin 16 banks apart, because of these places.
constexpr int kPlaneGap = 4;

ForwardLayout forward_layout(const Tiling& tiling, int row_bytes, int batch_tile) {
  ForwardLayout out{};
  out.stages = stage_layout(tiling, row_bytes);
  out.s = out.stages.end;
  out.entry = out.s + 4 * (batch_tile == 1 ? 4 : batch_tile) * (tiling.places + kPlaneGap);
  out.x = out.entry + 4 * kMaxRows;
  out.x_bytes = batch_tile * row_bytes;
  out.last = out.x + out.stages.depth * out.x_bytes;
  out.bytes = out.last + kAlign;
  return out;
}

// The index in S of the first of a place's 4 sums in a plane, which are of 4 rows of x.
RPG_FUNCTION int s_at(int plane, int place, int places) {
  return (plane * (places + kPlaneGap) + place) * 4;
}

// Byte of chunk c of row m of a column of x, exchanged as in blocks; in fp32 all read one address.
template <class T>
RPG_FUNCTION int x_byte(int m, int c, int chunks) {
  return 16 * (kTensorCores<T> ? chunk_at(m, c, chunks) : m * chunks + c);
}

// This thread's 16 bytes of a column of x, which has at most one such chunk for each thread.
struct XCopy {
  const char* source;  // Where they are in column 0.
  int target;          // Where they go in shared memory.
  int first, end;  // The first one's number in a block; columns b < end have them, in all others
                   // they are zeros.
  bool active;     // Whether this thread has such bytes.
};

template <class T, int BATCH>
RPG_FUNCTION XCopy x_copy(const LinearKernelArgs& args, int m0) {
  constexpr int kBytes = sizeof(typename T::Bits);
  static_assert(BATCH * 64 * kBytes / 16 <= kThreads, "16 bytes of x for a thread");
  const int log = args.layout.stages.log_chunks, m = thread() >> log, block = args.layer.block;
  const int c = thread() & ((1 << log) - 1), e = c * (16 / kBytes);
  const bool active = m < BATCH, row = active && m0 + m < args.call.batch;
  const int end = row ? (args.layer.columns - e + block - 1) / block : 0;
  const int64_t first = row ? int64_t{m0 + m} * args.layer.columns + e : 0;
  return {kept(static_cast<const char*>(args.call.x) + first * kBytes),
          kept(x_byte<T>(m, c, 1 << log)), e, kept(end), active};
}

// A column of x into shared memory; zeros behind the batch and the end of a row.
template <class T>
RPG_FUNCTION void fill_x(const LinearKernelArgs& args, const XCopy& copy, int b,
                         const Shared<char>& x) {
  using Bits = typename T::Bits;
  if (!copy.active) return;
  const bool valid = b < copy.end;
  char* const target = x.span(copy.target, 16);
  const char* const source = copy.source + uint64_t{valid ? b : 0u} * args.layout.stages.row_bytes;
  if (args.x_aligned) return copy_async(target, source, valid);
  const int left = valid ? args.layer.columns - b * args.layer.block - copy.first : 0;
  for (int e = 0; e < int{16 / sizeof(Bits)}; ++e) {
    reinterpret_cast<Bits*>(target)[e] = e < left ? reinterpret_cast<const Bits*>(source)[e] : 0;
  }
}

// What a lane reads and writes in the products of all columns.
template <int FRAGMENTS>
struct ProductLane {
  int chunk[4];        // For four steps of 16 elements: chunks of the first of a warp's 16 blocks.
  int x[2];            // Bytes of x, for two steps each.
  int sum[FRAGMENTS];  // Sums of place g, 8 places before those of g + 8, and of rows 8 n + 2 t and
                       // the next, or at batch 1 of copy t.
};

template <class T, int BATCH>
RPG_FUNCTION auto product_lane(const LinearKernelArgs& args) {
  ProductLane<kFragments<BATCH>> out;
  const int lane = thread() % kWarp, g = lane / 4, t = lane % 4;
  const int block = args.layer.block, chunks = block / 8;
  // Lanes 0 to 15 give rows 0 to 15 of the first 8 elements of a step, the others of the next 8.
  const int row = lane % 16 * chunks, swap = chunk_at(lane % 16, lane / 16, chunks) - row;
  RPG_UNROLL
  for (int k = 0; k < 4; ++k) out.chunk[k] = kept(row + (swap ^ 2 * k));
  // At batch 1 all 8 columns of the product are those of one row.
  RPG_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int c = lane / 8 + (block == 64 ? 4 * half : 0);
    out.x[half] = kept(x_byte<T>(BATCH == 1 ? 0 : lane % 8, c, chunks));
  }
  RPG_UNROLL
  for (int n = 0; n < kFragments<BATCH>; ++n) {
    const int place = s_at(2 * n + t / 2, g, args.plan.places) + 2 * (t % 2);
    out.sum[n] = kept(BATCH == 1 ? 8 * t + g : place);
  }
  return out;
}

// S = blocks · xᵀ by tensor cores: a warp takes 16 places, all of the batch; `ldmatrix` brings 16 x
// 16 of the bank and x, whose fragments are read once for a column. What lies behind the filled
// places is multiplied up to a multiple of 16, and never read.
template <class T, int BATCH>
RPG_FUNCTION void products_mma(const LinearKernelArgs& args,
                               const ProductLane<kFragments<BATCH>>& lane, const Stage& stage,
                               const Shared<char>& x, const Shared<float>& s) {
  const int block = args.layer.block, chunks = block / 8;
  // Elements 32 half ... of x: [tile][half], fragments of two steps of 16.
  uint32_t b[kFragments<BATCH>][2][4];
  RPG_UNROLL
  for (int n = 0; n < kFragments<BATCH>; ++n) {
    load_matrices(b[n][0], x.span(lane.x[0] + 8 * n * block * 2, 16));
    if (block == 64) load_matrices(b[n][1], x.span(lane.x[1] + 8 * n * block * 2, 16));
  }
  RPG_LOOP
  for (int first = thread() / kWarp * 16; first < stage.filled; first += kWarps * 16) {
    const Shared<uint4> blocks = stage.blocks.tail(first * chunks);
    const Shared<float> sums = s.tail(4 * first);
    float c[kFragments<BATCH>][4] = {};
    const auto step = [&](int k) {
      uint32_t a[4];
      load_matrices(a, blocks.span(lane.chunk[k], 1));
      RPG_UNROLL
      for (int n = 0; n < kFragments<BATCH>; ++n)
        multiply(T{}, {c[n], a, b[n][k / 2] + 2 * (k % 2)});
    };
    step(0);
    step(1);
    if (block == 64) {
      step(2);
      step(3);
    }
    RPG_UNROLL
    for (int i = 0; i < 2 * kFragments<BATCH>; ++i) {
      const int n = i / 2, half = i % 2;
      if constexpr (BATCH == 1) {
        sums[lane.sum[n] + 32 * half] = c[n][2 * half];
      } else {
        store(sums.span(lane.sum[n] + 32 * half, 2),
              Vector<float, 2>{{c[n][2 * half], c[n][2 * half + 1]}});
      }
    }
  }
}

// S = blocks · xᵀ in fp32: a thread takes a place.
template <int BATCH>
RPG_FUNCTION void products_fma(const LinearKernelArgs& args, const Stage& stage,
                               const Shared<char>& x, const Shared<float>& s) {
  const int chunks = args.layer.block / 4, pitch = 4 * args.layer.block;
  RPG_LOOP
  for (int place = thread(); place < stage.filled; place += kThreads) {
    float sum[BATCH] = {};
    for (int c = 0; c < chunks; ++c) {
      const auto w = load<Vector<float, 4>>(stage.blocks.span(chunk_at(place, c, chunks), 1));
      RPG_UNROLL
      for (int m = 0; m < BATCH; ++m) {
        const auto v = load<Vector<float, 4>>(x.span(m * pitch + 16 * c, 16));
        RPG_UNROLL
        for (int e = 0; e < 4; ++e) sum[m] = fused(w.value[e], v.value[e], sum[m]);
      }
    }
    if constexpr (BATCH == 1) {
      RPG_UNROLL
      for (int i = 0; i < 4; ++i) s[spread_place(place, thread() / 8 + i)] = sum[0];
    } else {
      RPG_UNROLL
      for (int plane = 0; plane < BATCH / 4; ++plane) {
        const float* const v = sum + 4 * plane;
        store(s.span(s_at(plane, place, args.plan.places), 4),
              Vector<float, 4>{{v[0], v[1], v[2], v[3]}});
      }
    }
  }
}

// Writes y[m, n], whose sum is `sum`.
template <class T>
RPG_FUNCTION void write(const CudaLinearArgs& call, int rows, int m, int n, float sum) {
  sum *= static_cast<float>(call.scale);
  if (call.bias) sum += call.bias[n];
  static_cast<typename T::Bits*>(call.y)[int64_t{m} * rows + n] = T::store(sum);
}

template <class T, int BATCH>
RPG_KERNEL(kThreads, 1)
linear_kernel(RPG_ARGS LinearKernelArgs args) {
  const ForwardLayout& layout = args.layout;
  const int m0 = cta_z() * BATCH, splits = args.plan.splits, rows = args.layer.rows;
  Columns columns = columns_of(args.layer, args.plan, layout.stages, args.call.ring);
  const Shared<float> s(layout.s, (layout.entry - layout.s) / 4);
  const Shared<uint32_t> entry(layout.entry, kMaxRows);
  const auto x_of = [&](int i) {
    return Shared<char>(layout.x + i * layout.x_bytes, layout.x_bytes);
  };
  const XCopy x_part = x_copy<T, BATCH>(args, m0);
  const auto copy_x = [&](int b, int i) { fill_x<T>(args, x_part, b, x_of(i)); };
  [[maybe_unused]] const auto product = product_lane<T, BATCH>(args);

  float y[kRows][BATCH] = {};
  // Rows after the last octet of the tile read place 0, and no row after the tile is written.
  for (int i = columns.rows + thread(); i < kMaxRows; i += kThreads) entry[i] = 0;
  start(columns, copy_x);
  RPG_LOOP
  for (int b = columns.first; b < columns.end; ++b) {
    const Stage stage = next_stage<T>(columns, b, copy_x);
    write_entries<BATCH == 1>(columns, b, stage, entry);
    if constexpr (kTensorCores<T>) {
      products_mma<T, BATCH>(args, product, stage, x_of(stage.number), s);
    } else {
      products_fma<BATCH>(args, stage, x_of(stage.number), s);
    }
    sync();
    look_ahead(columns, b, stage);
    RPG_UNROLL
    for (int k = 0; k < kRows; ++k) {
      if (k * kThreads >= columns.rows) break;
      const uint32_t row_entry = entry[thread() + k * kThreads];
      const int place = place_of(row_entry);  // at batch 1 the index of one of its copies in S
      if (BATCH == 1) y[k][0] += as_float(as_bits(s[place]) ^ (row_entry & 0x80000000u));
      const float sign = sign_of(row_entry);
      RPG_UNROLL
      for (int plane = 0; plane < BATCH / 4; ++plane) {
        const auto v = load<Vector<float, 4>>(s.span(s_at(plane, place, args.plan.places), 4));
        RPG_UNROLL
        for (int m = 0; m < 4; ++m) {
          y[k][4 * plane + m] = fused(sign, v.value[m], y[k][4 * plane + m]);
        }
      }
    }
  }

  const int left = static_cast<int>(args.call.batch) - m0, batch = left < BATCH ? left : BATCH;
  float* const partial = args.call.workspace + int64_t{m0} * rows;  // [splits, batch, N] from m0 on
  const int64_t split_step = args.call.batch * rows;
  RPG_UNROLL
  for (int k = 0; k < kRows; ++k) {
    const int i = thread() + k * kThreads, n = columns.row + i;
    if (i >= columns.rows) continue;
    RPG_UNROLL
    for (int m = 0; m < BATCH; ++m) {
      if (m >= batch) continue;
      if (splits == 1) {
        write<T>(args.call, rows, m0 + m, n, y[k][m]);
      } else {
        partial[cta_y() * split_step + int64_t{m} * rows + n] = y[k][m];
      }
    }
  }
  if (splits == 1) return;
  unsigned* const counter = args.call.counters + cta_z() * args.plan.tiles + cta_x();
  if (!is_last(Shared<int>(layout.last, 1), counter, splits)) return;
  RPG_LOOP
  for (int i = thread(); i < columns.rows * batch; i += kThreads) {
    const int m = i / columns.rows, n = columns.row + i - m * columns.rows;
    write<T>(args.call, rows, m0 + m, n,
             sum_of(partial + int64_t{m} * rows + n, splits, split_step));
  }
}

template <class T, int BATCH>
void run(const Layer& layer, const Plan& plan, const CudaLinearArgs& args) {
  constexpr int kBytes = sizeof(typename T::Bits);
  const bool aligned =
      reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && args.columns * kBytes % 16 == 0;
  launch(linear_kernel<T, BATCH>, {plan.tiles, plan.splits, plan.batch_tiles}, kThreads,
         plan.shared_bytes, args.stream,
         LinearKernelArgs{layer, plan, forward_layout(plan, layer.block * kBytes, BATCH), args,
                          aligned});
}

template <class T>
void run_batch(const Layer& layer, const Plan& plan, const CudaLinearArgs& args) {
  switch (plan.batch_tile) {
    case 1: return run<T, 1>(layer, plan, args);
    case 8: return run<T, 8>(layer, plan, args);
    case 16: return run<T, 16>(layer, plan, args);
    default:  // plan_linear gives fp32 at most 16: sums of 32 would not leave registers enough
      if constexpr (kTensorCores<T>) run<T, 32>(layer, plan, args);
  }
}

}  // namespace

Plan plan_linear(const LayerLaw& law, Dtype dtype, int64_t batch, int64_t columns,
                 const Device& device) {
  const Layer layer = layer_of(law, columns);
  const int row_bytes = layer.block * element_bytes(dtype);
  const auto bytes = [&](const Tiling& tiling, int batch_tile) {
    return forward_layout(tiling, row_bytes, batch_tile).bytes;
  };
  Plan out = plan_tiles(law, row_bytes, batch, dtype == Dtype::kFloat32 ? 16 : 32, device, bytes);
  if (out.splits > 1) {
    out.workspace = int64_t{out.splits} * batch * layer.rows;
    out.counters = out.tiles * out.batch_tiles;
  }
  return out;
}

void linear(const LayerLaw& law, const Plan& plan, const CudaLinearArgs& args) {
  const Layer layer = layer_of(law, args.columns);
  switch (args.dtype) {
    case Dtype::kBfloat16: return run_batch<Bfloat16>(layer, plan, args);
    case Dtype::kFloat16: return run_batch<Float16>(layer, plan, args);
    default: return run_batch<Float32>(layer, plan, args);
  }
}

}  // namespace rpg::RPG_DEVICE
