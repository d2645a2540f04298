// tile_linear_grads: dx [batch, K] = scale · dy [batch, N] · (G ring) and
// dw [slots, block] += scale · Gᵀ · (dyᵀ x), where rows share no products; either or both.
//
// Dense products with tiles of Ŵ (tile.h), R rows of a few blocks. For L rows of the batch:
//
//   dx_b [L, block]  += dy [L, R] · tile_b [R, block]
//   P_b [R, block]    = dyᵀ [R, L] · x_b [L, block];   dw[slot] += ± scale · P_b[row]
//
// Memory, for L = 256 and 4096 rows and columns of blocks of 64:
//
//   x, dx        [K / block, L, block]  4 MB each   L3; for all threads, as is
//   dy by rows   [L, R + 16]            160 KB      L2
//   dy by lanes  [R, L + 16]            160 KB      L2
//   tile         [R, 256 + 16]          153 KB      L2; for each thread, as what follows
//   P            [R, 256]               144 KB      L2
//   entries      [R, 256 / block]       2 KB
//
// Multiplications: those of the dense products. Beside them, per weight and L rows of the batch: a
// load and a store for the tile; a store of P, a load of it, and a load and a store of dw.
//
// Threads share the columns, so dx does not depend on their number. What they have in P is added to
// dw tile by tile: each thread adds to the slots of a zone of the ring, from the tiles of all in
// order, so no two write the same, and dw depends on their number in rounding alone.

#include "cpu/kernels.h"
#include "cpu/product.h"
#include "cpu/tile.h"

namespace rpg::RPG_ISA {

namespace {

// How the workspace is divided, in bytes: what all threads share, and what each has.
struct TileGradsLayout {
  int64_t row_parts, block_parts;  // that the rows and the blocks of Ŵ are cut into
  int64_t rows, blocks;            // of the largest tile
  int64_t x, dx, dy_rows, dy_lanes;
  int64_t tile, products, entries;
  int64_t shared() const { return x + dx + dy_rows + dy_lanes; }
  int64_t of_thread() const { return tile + products + entries; }
};

TileGradsLayout layout_of(const LayerLaw& law, const LanesLinearGradsArgs& args) {
  TileGradsLayout out{};
  const int64_t block = law.granularity, lanes = args.lanes;
  out.row_parts = parts_of(law.rows, kTileRows, 1);
  out.block_parts = parts_of(law.blocks, most_blocks(law), args.threads);
  out.rows = deal(law.rows, out.row_parts, 1);
  out.blocks = deal(law.blocks, out.block_parts, 1);
  const WeightTile largest{0, out.rows, 0, out.blocks};
  if (args.dw) {
    out.x = lines(4 * law.blocks * lanes * (block + kPitch));
    out.dy_lanes = lines(4 * ((out.rows + 7) / 8 * 8) * (lanes + kPitch));
    out.products = lines(4 * out.rows * out.blocks * block);
  }
  if (args.dx) {
    out.dx = lines(4 * law.blocks * lanes * block);
    out.dy_rows = lines(4 * lanes * (out.rows + kPitch));
    out.tile = lines(4 * out.rows * largest.pitch(law.granularity));
  }
  out.entries = lines(4 * out.rows * out.blocks);
  return out;
}

class TileLinearGrads {
 public:
  TileLinearGrads(const LayerLaw& law, const LanesLinearGradsArgs& args)
      : law_(law),
        args_(args),
        layout_(layout_of(law, args)),
        ring_{args.bank, int64_t{law.slots}, law.granularity} {
    Carver carver(args.workspace, 0);
    carver.take(x_, layout_.x);
    carver.take(dx_, layout_.dx);
    carver.take(dy_rows_, layout_.dy_rows);
    carver.take(dy_lanes_, layout_.dy_lanes);
  }

  void run() {
    const int64_t rounds = (layout_.block_parts + args_.threads - 1) / args_.threads;
    for (int64_t m0 = 0; m0 < args_.batch; m0 += args_.lanes) {
      const int64_t batch = std::min<int64_t>(args_.batch - m0, args_.lanes);
#pragma omp parallel num_threads(args_.threads)
      {
#pragma omp for schedule(static)
        for (int64_t block = 0; block < law_.blocks; ++block) begin_block(m0, batch, block);
        for (int64_t part = 0; part < layout_.row_parts; ++part) {
          const int64_t row = deal(law_.rows, layout_.row_parts, part);
          const int64_t rows = deal(law_.rows, layout_.row_parts, part + 1) - row;
#pragma omp for schedule(static)
          for (int64_t m = 0; m < batch; m += 8) pack_dy(m0, batch, m, row, rows);
          for (int64_t round = 0; round < rounds; ++round) {
#pragma omp for schedule(static)
            for (int thread = 0; thread < args_.threads; ++thread) {
              multiply_tile(thread, tile_of(round, thread, row, rows), batch);
            }
            if (!args_.dw) continue;
#pragma omp for schedule(static)
            for (int zone = 0; zone < args_.threads; ++zone) {
              for (int thread = 0; thread < args_.threads; ++thread) {
                add_products(zone, thread, tile_of(round, thread, row, rows));
              }
            }
          }
        }
#pragma omp for schedule(static)
        for (int64_t block = 0; block < law_.blocks; ++block) write_dx(m0, batch, block);
      }
    }
  }

 private:
  struct TileGradsMemory {
    float *tile, *products;
    uint32_t* entries;
  };

  TileGradsMemory memory_of(int thread) const {
    Carver carver(args_.workspace, layout_.shared() + thread * layout_.of_thread());
    TileGradsMemory out{};
    carver.take(out.tile, layout_.tile);
    carver.take(out.products, layout_.products);
    carver.take(out.entries, layout_.entries);
    return out;
  }

  // A thread's tile of a round; without blocks where there are no more.
  WeightTile tile_of(int64_t round, int thread, int64_t row, int64_t rows) const {
    const int64_t part = std::min(round * args_.threads + thread, layout_.block_parts);
    const int64_t block = deal(law_.blocks, layout_.block_parts, part);
    if (part == layout_.block_parts) return {row, rows, block, 0};
    return {row, rows, block, deal(law_.blocks, layout_.block_parts, part + 1) - block};
  }
  int valid_of(int64_t block) const {
    return static_cast<int>(
        std::min<int64_t>(args_.columns - block * law_.granularity, law_.granularity));
  }
  int64_t x_pitch() const { return law_.granularity + kPitch; }
  int64_t rows_pitch() const { return layout_.rows + kPitch; }
  int64_t lanes_pitch() const { return args_.lanes + kPitch; }

  void begin_block(int64_t m0, int64_t batch, int64_t block) const {
    const int64_t column = block * law_.granularity;
    if (args_.dw) {
      pack_rows({args_.dtype, args_.x}, m0 * args_.columns + column, args_.columns, batch,
                valid_of(block), static_cast<int>(batch), law_.granularity,
                static_cast<int>(x_pitch()), x_ + block * args_.lanes * x_pitch());
    }
    if (args_.dx) {
      std::memset(dx_ + column * args_.lanes, 0, sizeof(float) * batch * law_.granularity);
    }
  }

  // 8 rows of dy, from row m of the lanes on.
  void pack_dy(int64_t m0, int64_t batch, int64_t m, int64_t row, int64_t rows) const {
    const Activations dy{args_.dtype, args_.dy};
    const int64_t first = (m0 + m) * law_.rows + row, count = std::min<int64_t>(batch - m, 8);
    for (int64_t i = 0; args_.dx && i < count; ++i) {
      read_some(dy.dtype, dy.element(first + i * law_.rows), static_cast<int>(rows),
                dy_rows_ + (m + i) * rows_pitch());
    }
    if (!args_.dw) return;
    for (int64_t n = 0; n < rows; n += 8) {
      Floats<8> square[8];
      load_square(dy, first + n, law_.rows, static_cast<int>(count),
                  static_cast<int>(std::min<int64_t>(rows - n, 8)), square);
      transpose8(square);
      for (int i = 0; i < 8; ++i) store<8>(dy_lanes_ + (n + i) * lanes_pitch() + m, square[i]);
    }
  }

  void multiply_tile(int thread, const WeightTile& tile, int64_t batch) const {
    if (!tile.blocks) return;
    const TileGradsMemory memory = memory_of(thread);
    const int block = law_.granularity, rows = static_cast<int>(tile.rows);
    read_entries(law_, tile, memory.entries);
    if (args_.dx) {
      gather(ring_, tile, memory.entries, memory.tile);
      for (int64_t b = 0; b < tile.blocks; ++b) {
        multiply<true>(static_cast<int>(batch), block, {dy_rows_, rows_pitch(), 1},
                       memory.tile + b * block, tile.pitch(block), rows,
                       dx_ + (tile.block + b) * args_.lanes * block, block);
      }
    }
    for (int64_t b = 0; args_.dw && b < tile.blocks; ++b) {
      multiply<false>(rows, block, {dy_lanes_, lanes_pitch(), 1},
                      x_ + (tile.block + b) * args_.lanes * x_pitch(), x_pitch(),
                      static_cast<int>(batch), memory.products + b * block, tile.blocks * block);
    }
  }

  // Adds the products of a thread to slots of a zone.
  void add_products(int zone, int thread, const WeightTile& tile) const {
    const TileGradsMemory memory = memory_of(thread);
    const int64_t block = law_.granularity, slots = law_.slots;
    const int64_t low = deal(slots, args_.threads, zone);
    const int64_t high = deal(slots, args_.threads, zone + 1);
    const float* product = memory.products;
    const uint32_t* entry = memory.entries;
    const Floats<8> scale = splat<8>(static_cast<float>(args_.scale));
    for (int64_t i = 0; i < tile.rows; ++i) {
      for (int64_t b = 0; b < tile.blocks; ++b, product += block, ++entry) {
        const int64_t slot = slot_of(*entry);
        if (slot < low || slot >= high) continue;
        const Floats<8> factor = flip_all<8>(scale, sign_of(*entry));
        float* target = args_.dw + slot * block;
        const int valid = valid_of(tile.block + b), whole = valid / 8 * 8;
        for (int e = 0; e < whole; e += 8) {
          store<8>(target + e, load<8>(target + e) + factor * load<8>(product + e));
        }
        for (int e = whole; e < valid; ++e) target[e] += factor[0] * product[e];
      }
    }
  }

  void write_dx(int64_t m0, int64_t batch, int64_t block) const {
    if (!args_.dx) return;
    const float scale = static_cast<float>(args_.scale);
    const int valid = valid_of(block);
    const int64_t size = element_bytes(args_.dtype), width = law_.granularity;
    for (int64_t m = 0; m < batch; ++m) {
      const float* dx = dx_ + (block * args_.lanes + m) * width;
      float out[128];
      for (int e = 0; e < valid; ++e) out[e] = scale * dx[e];
      void* target =
          static_cast<char*>(args_.dx) + ((m0 + m) * args_.columns + block * width) * size;
      write_some(args_.dtype, out, valid, target);
    }
  }

  const LayerLaw& law_;
  const LanesLinearGradsArgs& args_;
  TileGradsLayout layout_;
  Ring ring_;
  float *x_, *dx_, *dy_rows_, *dy_lanes_;
};

}  // namespace

Workspace tile_linear_grads_workspace(const LayerLaw& law, const LanesLinearGradsArgs& args) {
  const TileGradsLayout layout = layout_of(law, args);
  return {layout.shared() + args.threads * layout.of_thread(), layout.shared()};
}

void tile_linear_grads(const LayerLaw& law, const LanesLinearGradsArgs& args) {
  TileLinearGrads(law, args).run();
}

}  // namespace rpg::RPG_ISA
