// tile_linear: y [batch, N] = scale · x [batch, K] · (G ring)ᵀ + bias, where rows share no
// products.
//
// A dense product whose left operand is gathered tile by tile (tile.h). For L rows of x ("lanes"),
// cut into panels of P lanes, x is [panels, K, P] and y [panels, R, P] for R rows of Ŵ:
//
//   for each k-chunk of 256 columns:   tile [R, 256] = rows of Ŵ;   y += tile · x   product.h
//
// Memory, for L = 256 and K = 4096:
//
//   x              [panels, K, P]   4 MB    L3, a panel's chunk of 16 KB in L1; for all threads
//   tile           [R, 256 + 16]    153 KB  L2; for each thread, as what follows
//   y              [panels, R, P]   144 KB  L2
//   entries        [R, 256 / block] 2 KB
//
// Multiplications: those of the dense product. Beside them, per weight and L rows of x: a load and
// a store for the tile, which for L = 256 are 2 of 34 instructions. Threads share the rows of Ŵ, so
// results do not depend on their number.

#include "cpu/kernels.h"
#include "cpu/product.h"
#include "cpu/tile.h"

namespace rpg::RPG_ISA {

namespace {

constexpr int kLaneStep = kVector < 8 ? 8 : kVector;

// How the workspace is divided, in bytes: x, and what each thread has.
struct TileLayout {
  int64_t row_parts;  // that the rows of Ŵ are cut into
  int64_t x, tile, y, entries;
  int64_t of_thread() const { return tile + y + entries; }
};

TileLayout layout_of(const LayerLaw& law, const LanesLinearArgs& args) {
  TileLayout out{};
  out.row_parts = parts_of(law.rows, kTileRows, args.threads);
  const int64_t rows = (deal(law.rows, out.row_parts, 1) + 7) / 8 * 8;
  const WeightTile largest{0, rows, 0, most_blocks(law)};
  out.x = lines(4 * law.blocks * law.granularity * args.lanes);
  out.tile = lines(4 * rows * largest.pitch(law.granularity));
  out.y = lines(4 * rows * args.lanes);
  out.entries = lines(4 * rows * largest.blocks);
  return out;
}

class TileLinear {
 public:
  TileLinear(const LayerLaw& law, const LanesLinearArgs& args)
      : law_(law),
        args_(args),
        layout_(layout_of(law, args)),
        ring_{args.bank, int64_t{law.slots}, law.granularity},
        depth_(law.blocks * law.granularity) {}

  void run() {
    const int64_t parts = layout_.row_parts;
    for (int64_t m0 = 0; m0 < args_.batch; m0 += args_.lanes) {
      const int64_t batch = std::min<int64_t>(args_.batch - m0, args_.lanes);
      const int64_t panels = (batch + kPanel - 1) / kPanel;
#pragma omp parallel num_threads(args_.threads)
      {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < panels * law_.blocks; ++i) {
          pack(m0, batch, i / law_.blocks, i % law_.blocks);
        }
#pragma omp for schedule(static)
        for (int part = 0; part < args_.threads; ++part) {
          for (int64_t t = deal(parts, args_.threads, part);
               t < deal(parts, args_.threads, part + 1); ++t) {
            const int64_t row = deal(law_.rows, parts, t);
            add_rows(part, row, deal(law_.rows, parts, t + 1) - row, m0, batch);
          }
        }
      }
    }
  }

 private:
  struct TileMemory {
    float *tile, *y;
    uint32_t* entries;
  };

  TileMemory memory_of(int part) const {
    Carver carver(args_.workspace, layout_.x + part * layout_.of_thread());
    TileMemory out{};
    carver.take(out.tile, layout_.tile);
    carver.take(out.y, layout_.y);
    carver.take(out.entries, layout_.entries);
    return out;
  }

  float* x_of(int64_t panel) const {
    return static_cast<float*>(args_.workspace) + panel * kPanel * depth_;
  }
  // Lanes of a panel: only as many vectors as the batch has.
  static int width_of(int64_t panel, int64_t batch) {
    const int64_t left = batch - panel * kPanel;
    return static_cast<int>(
        std::min<int64_t>((left + kLaneStep - 1) / kLaneStep * kLaneStep, kPanel));
  }

  void pack(int64_t m0, int64_t batch, int64_t panel, int64_t block) const {
    const int64_t column = block * law_.granularity;
    const int width = width_of(panel, batch);
    pack_lanes({args_.x_dtype, args_.x}, (m0 + panel * kPanel) * args_.columns + column,
               args_.columns, batch - panel * kPanel,
               std::min<int64_t>(args_.columns - column, law_.granularity), width,
               x_of(panel) + column * width);
  }

  void add_rows(int part, int64_t row, int64_t rows, int64_t m0, int64_t batch) const {
    const TileMemory memory = memory_of(part);
    const int64_t chunk = most_blocks(law_);
    for (int64_t block = 0; block < law_.blocks; block += chunk) {
      const WeightTile tile{row, rows, block, std::min(law_.blocks - block, chunk)};
      read_entries(law_, tile, memory.entries);
      gather(ring_, tile, memory.entries, memory.tile);
      const int64_t column = block * law_.granularity;
      const int steps = static_cast<int>(
          std::min<int64_t>(args_.columns - column, tile.blocks * law_.granularity));
      const Factor a{memory.tile, tile.pitch(law_.granularity), 1};
      for (int64_t panel = 0; panel * kPanel < batch; ++panel) {
        const int width = width_of(panel, batch);
        const float* x = x_of(panel) + column * width;
        float* y = memory.y + panel * kPanel * layout_rows();
        if (block) {
          multiply<true>(static_cast<int>(rows), width, a, x, width, steps, y, width);
        } else {
          multiply<false>(static_cast<int>(rows), width, a, x, width, steps, y, width);
        }
      }
    }
    const Stored out{args_.x_dtype, args_.y, law_.rows, static_cast<float>(args_.scale),
                     args_.bias};
    for (int64_t panel = 0; panel * kPanel < batch; ++panel) {
      const float* sums[1] = {memory.y + panel * kPanel * layout_rows()};
      store_lanes(out, sums, 1, width_of(panel, batch), row, rows, m0 + panel * kPanel,
                  std::min<int64_t>(batch - panel * kPanel, kPanel));
    }
  }

  int64_t layout_rows() const { return (deal(law_.rows, layout_.row_parts, 1) + 7) / 8 * 8; }

  const LayerLaw& law_;
  const LanesLinearArgs& args_;
  TileLayout layout_;
  Ring ring_;
  int64_t depth_;  // K in whole blocks
};

}  // namespace

Workspace tile_linear_workspace(const LayerLaw& law, const LanesLinearArgs& args) {
  const TileLayout layout = layout_of(law, args);
  return {layout.x + args.threads * layout.of_thread(), layout.x};
}

void tile_linear(const LayerLaw& law, const LanesLinearArgs& args) { TileLinear(law, args).run(); }

}  // namespace rpg::RPG_ISA
