// Products of linear.cu: S = blocks · xᵀ of a column, in shared memory.
//
// A warp takes 16 blocks by tensor cores, all of the batch: `ldmatrix` brings 16 x 16 of the bank
// and x, whose fragments are read once for a column; S is written 8 bytes at a time. In fp32 a
// thread takes a block. S: planes of 4 sums for each place, or at batch 1 four copies of one.

#pragma once

#include "cuda/entries.h"
#include "cuda/multiply.h"
#include "cuda/plan.h"

namespace rpg::RPG_DEVICE {

struct LinearKernelArgs {
  Layer layer;
  Tiling tiling;
  StageLayout layout;
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
  int s, entry, x_at, x_bytes, last;  // as in LinearSharedPlan; x_bytes are those of a stage
};

template <class Math, int BATCH>
struct LinearShape {
  static constexpr int kRows = kMaxRows / kThreads;  // of a thread
  static constexpr int kPlanes = BATCH / 4;          // of S, from batch 8 on: of 4 rows of x
  static constexpr int kBytes = sizeof(typename Math::Number::Bits);
  // Floats of a place in S: at batch 1 there are four copies, see entries.h.
  static constexpr int kSums = BATCH == 1 ? 4 : BATCH;
  static constexpr int kTiles = (BATCH + 7) / 8;  // of 8 rows of x, for tensor cores

  // Byte of chunk c of row m of a column of x, exchanged as those of blocks are (stage.h) where
  // ldmatrix reads it; in fp32 all threads read the same.
  RPG_FUNCTION int x_byte(int m, int c, int block) {
    const int chunks = block * kBytes / 16;
    return 16 * (Math::kTensorCores ? chunk_at(m, c, chunks) : m * chunks + c);
  }
};

// S of one plane: 4 sums of a place. Four places between planes put two of them, which the
// lanes of a store of products write, on different banks.
constexpr int kPlaneGap = 4;

RPG_FUNCTION int s_at(int plane, int place, int places) {
  return (plane * (places + kPlaneGap) + place) * 4;
}

// Where S and what goes with it begin in shared memory, behind the stages, in bytes.
struct LinearSharedPlan {
  StageLayout layout;
  int s, entry, x_at, last, bytes;
};

RPG_HOST LinearSharedPlan shared_plan(const Tiling& tiling, int row_bytes, int x_bytes,
                                      int s_floats) {
  LinearSharedPlan out{};
  out.layout = stage_layout(tiling, row_bytes);
  out.s = out.layout.end;
  out.entry = out.s + 4 * s_floats * (tiling.places + kPlaneGap);
  out.x_at = out.entry + 4 * kMaxRows;
  out.last = out.x_at + out.layout.depth * x_bytes;
  out.bytes = out.last + kAlign;
  return out;
}

// This thread's 16 bytes of a column of x: its rows have no more of them than there are threads.
struct XCopy {
  const char* source;  // Where they are in column 0.
  int target;          // Where they go in shared memory.
  int end;             // Columns b < end have them; in all others they are zeros.
  bool active;         // Whether this thread has such bytes.
};

template <class Math, int BATCH>
RPG_FUNCTION XCopy x_copy(const LinearKernelArgs& args, int m0) {
  using Sizes = LinearShape<Math, BATCH>;
  static_assert(BATCH * 64 * Sizes::kBytes / 16 <= kThreads, "16 bytes of x for a thread");
  const int log = args.layout.log_chunks, m = thread() >> log;
  const int c = thread() & ((1 << log) - 1), e = c * (16 / Sizes::kBytes), block = args.layer.block;
  const bool active = args.x_aligned && m < BATCH, row = active && m0 + m < args.batch;
  const int end = row ? (args.layer.columns - e + block - 1) / block : 0;
  const int64_t first = row ? int64_t{m0 + m} * args.layer.columns + e : 0;
  return {kept(static_cast<const char*>(args.x) + first * Sizes::kBytes),
          kept(Sizes::x_byte(m, c, block)), kept(end), active};
}

// x [rows m0 ..., column b] into shared memory; zeros behind the batch and the end of a row.
template <class Math, int BATCH>
RPG_FUNCTION void fill_x(const LinearKernelArgs& args, const XCopy& copy, int m0, int b,
                         const Shared<char>& x_stage) {
  using Bits = typename Math::Number::Bits;
  using Sizes = LinearShape<Math, BATCH>;
  if (copy.active) {
    const bool valid = b < copy.end;
    const uint32_t column = valid ? b : 0;
    copy_async(x_stage.span(copy.target, 16), copy.source + uint64_t{column} * args.bank.row_bytes,
               valid);
  }
  if (args.x_aligned) return;
  const int block = args.layer.block, columns = args.layer.columns, column = b * block;
  const Bits* const x = static_cast<const Bits*>(args.x);
  RPG_LOOP
  for (int i = thread(); i < BATCH * block; i += kThreads) {
    const int m = i / block, e = i - m * block;
    const bool valid = m0 + m < args.batch && column + e < columns;
    const int chunk = e * Sizes::kBytes / 16,
              offset = Sizes::x_byte(m, chunk, block) + e * Sizes::kBytes % 16;
    *reinterpret_cast<Bits*>(x_stage.span(offset, Sizes::kBytes)) =
        valid ? x[int64_t{m0 + m} * columns + column + e] : Bits{0};
  }
}

// What a lane reads and writes in all products.
template <int TILES>
struct ProductLane {
  int chunk[4];    // For four steps of 16 elements: chunks of the first of a warp's 16 blocks.
  int x[2];        // Bytes of x, for two steps each.
  int sum[TILES];  // Sums of place g, 8 places before those of g + 8, and of rows 8 n + 2 t and the
                   // next, or at batch 1 of copy t.
};

template <class Math, int BATCH>
RPG_FUNCTION auto product_lane(const LinearKernelArgs& args) {
  using Sizes = LinearShape<Math, BATCH>;
  ProductLane<Sizes::kTiles> out;
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
    out.x[half] = kept(Sizes::x_byte(BATCH == 1 ? 0 : lane % 8, c, block));
  }
  RPG_UNROLL
  for (int n = 0; n < Sizes::kTiles; ++n) {
    const int place = s_at(2 * n + t / 2, g, args.tiling.places) + 2 * (t % 2);
    out.sum[n] = kept(BATCH == 1 ? 8 * t + g : place);
  }
  return out;
}

// S = blocks · xᵀ by tensor cores: a warp takes 16 places, all of the batch. What lies behind
// `used` places is multiplied up to a multiple of 16, and never read.
template <class Math, int BATCH>
RPG_FUNCTION void products_mma(const LinearKernelArgs& args,
                               const ProductLane<LinearShape<Math, BATCH>::kTiles>& lane, int used,
                               const Stage& stage, const Shared<char>& x, const Shared<float>& s) {
  using Sizes = LinearShape<Math, BATCH>;
  constexpr int kTiles = Sizes::kTiles;
  const int block = args.layer.block, chunks = block / 8;
  // Elements 32 half ... of x: [tile][half], fragments of two steps of 16.
  uint32_t b[kTiles][2][4];
  RPG_UNROLL
  for (int n = 0; n < kTiles; ++n) {
    load_matrices(b[n][0], x.span(lane.x[0] + 8 * n * block * Sizes::kBytes, 16));
    if (block == 64) load_matrices(b[n][1], x.span(lane.x[1] + 8 * n * block * Sizes::kBytes, 16));
  }
  RPG_LOOP
  for (int first = thread() / kWarp * 16; first < used; first += kWarps * 16) {
    const Shared<uint4> blocks = stage.blocks.tail(first * chunks);
    const Shared<float> sums = s.tail(4 * first);
    float c[kTiles][4] = {};
    const auto step = [&](int k) {
      uint32_t a[4];
      load_matrices(a, blocks.span(lane.chunk[k], 1));
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
          sums[lane.sum[n] + 32 * half] = c[n][2 * half];
        } else {
          store(sums.span(lane.sum[n] + 32 * half, 2),
                Vector<float, 2>{{c[n][2 * half], c[n][2 * half + 1]}});
        }
      }
    }
  }
}

// S = blocks · xᵀ in fp32: a thread takes a place.
template <int BATCH>
RPG_FUNCTION void products_fma(const LinearKernelArgs& args, int used, const Stage& stage,
                               const Shared<char>& x, const Shared<float>& s) {
  const int chunks = args.layer.block / 4, pitch = 4 * args.layer.block;
  RPG_LOOP
  for (int place = thread(); place < used; place += kThreads) {
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
      for (int i = 0; i < 4; ++i) {
        s[spread_place(place, thread() / 8 + i)] = sum[0];
      }
    } else {
      RPG_UNROLL
      for (int plane = 0; plane < LinearShape<Fma, BATCH>::kPlanes; ++plane) {
        Vector<float, 4> v;
        RPG_UNROLL
        for (int m = 0; m < 4; ++m) v.value[m] = sum[4 * plane + m];
        store(s.span(s_at(plane, place, args.tiling.places), 4), v);
      }
    }
  }
}

}  // namespace rpg::RPG_DEVICE
