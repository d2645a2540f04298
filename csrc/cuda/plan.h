// How a layer is cut into tiles: on the host, in the same way for every device.

#pragma once

#include <stdexcept>
#include <string>

#include "cuda/linear.h"
#include "cuda/tile.h"

namespace rpg::RPG_DEVICE {

constexpr int kMaxRows = 1024;    // of a tile, 4 of a thread
constexpr int kMaxGridZ = 65535;  // CUDA allows no more CTAs in the third direction

// A layer of a launch is one band.
static inline Layer layer_of(const LayerLaw& law, int64_t columns, int64_t band = 0) {
  Layer out{};
  out.windows = law.window != 0;
  if (out.windows) {
    out.law = make_window_band(law, band);
  } else {
    static_cast<BandLaw&>(out.law) = make_band_law(law, band);
  }
  const int64_t left = law.rows - band * law.rows_per_band;
  out.rows = static_cast<int>(left < law.rows_per_band ? left : law.rows_per_band);
  out.blocks = static_cast<int>(law.blocks);
  out.block = law.granularity;
  out.columns = static_cast<int>(columns);
  out.reflect = law.reflect;
  return out;
}

static inline int round_up(int64_t x, int step) {
  return static_cast<int>((x + step - 1) / step * step);
}

// How many windows a column of a tile reads at most, where tiles of `rows` rows begin at multiples
// of `rows`.
static inline int windows_of(const LayerLaw& law, int rows) {
  const WindowBand band = make_window_band(law, 0);
  const int cell = static_cast<int>(band.cell), offset = static_cast<int>(band.offset);
  if (cell <= rows && rows % cell == 0) return rows / cell + (offset % cell != 0);
  if (cell > rows && cell % rows == 0) return 1 + (offset % rows != 0);
  return rows / cell + 2;
}

// Returns a tiling that reads windows, in stages of at most `max_bytes` bytes and tiles of at most
// `largest` rows; its fill is kGather where there is none.
static inline Tiling tiling_of_windows(const LayerLaw& law, int row_bytes, int max_bytes,
                                       int largest) {
  Tiling out{};
  out.fill = Fill::kGather;
  // Signs of elements are put on blocks that belong to one row.
  if (law.reflect == Reflect::kElement || !law.window) return out;
  for (int rows = largest; rows >= 64; rows /= 2) {
    const int64_t windows = windows_of(law, rows), places = windows * law.window;
    if (places >= rows || places * row_bytes > max_bytes || windows > kMaxWindows) continue;
    if (law.rows / rows * rows * 4 < law.rows * 3) continue;  // a rest of more than a quarter
    out.fill = Fill::kWindows;
    out.rows = rows;
    out.filled_tiles = static_cast<int>(law.rows / rows);
    out.places = static_cast<int>(places);
    return out;
  }
  return out;
}

// Returns the tiling for `stages` stages of at most `max_bytes` bytes and tiles of at most
// `largest` rows.
static inline Tiling tiling_of(const LayerLaw& law, int row_bytes, int stages, int max_bytes,
                               int largest) {
  Tiling out = tiling_of_windows(law, row_bytes, max_bytes, largest);
  out.stages = stages;
  const int64_t ring_bytes = int64_t{law.slots} * row_bytes;
  if (!out.filled_tiles && law.reflect != Reflect::kElement &&
      ring_bytes <= max_bytes * int64_t{stages}) {
    out.fill = Fill::kRing;
    out.rows = largest;
    while (out.rows >= 2 * law.rows && out.rows > 64) out.rows /= 2;
    out.filled_tiles = static_cast<int>((law.rows + out.rows - 1) / out.rows);
    out.places = round_up(law.slots, kMmaBlocks);
    out.gathered_rows = out.rows;
    out.stages = 1;
  }
  if (out.fill != Fill::kRing) {
    if (!out.places) out.places = 2 * kThreads;
    while (out.places * row_bytes > max_bytes && out.places > 64) out.places /= 2;
    out.gathered_rows = out.places < 2 * kThreads ? out.places : 2 * kThreads;
  }
  const int64_t left = law.rows - int64_t{out.filled_tiles} * out.rows;
  if (left <= 0 && out.fill == Fill::kWindows) out.gathered_rows = 0;
  out.tiles = out.filled_tiles +
              (left > 0 ? static_cast<int>((left + out.gathered_rows - 1) / out.gathered_rows) : 0);
  return out;
}

static inline Tiling tiling_of(const Plan& plan) {
  return {static_cast<Fill>(plan.fill),
          plan.rows,
          plan.filled_tiles,
          plan.gathered_rows,
          plan.tiles,
          plan.places,
          plan.stages};
}

// The start of a CTA is taken to cost as much as so many columns.
constexpr int kStartColumns = 2;

// How many CTAs share the columns of each tile, one CTA at a time on a processor: the number with
// which a processor takes the fewest columns one after the other, starts of CTAs counted too.
static inline int splits_of(int64_t tiles, int64_t columns, int64_t sms) {
  int64_t best = 1, least = 0;
  for (int64_t splits = 1; splits <= columns && splits * tiles <= 4 * sms + tiles; ++splits) {
    const int64_t waves = (splits * tiles + sms - 1) / sms;
    const int64_t cost = waves * ((columns + splits - 1) / splits + kStartColumns);
    if (splits == 1 || cost < least) best = splits, least = cost;
  }
  return static_cast<int>(best);
}

// Returns the plan of a product: the largest steps, up to `largest` rows of the batch, whose shared
// memory, bytes(tiling, batch_tile), a CTA may have. Kernels add workspace and counters themselves.
template <class SharedBytes>
Plan plan_tiles(const LayerLaw& law, int row_bytes, int64_t batch, int largest,
                const Device& device, const SharedBytes& bytes) {
  Plan out{};
  const auto fits = [&](int batch_tile, int stages, int max_bytes, int rows) {
    const Tiling tiling = tiling_of(law, row_bytes, stages, max_bytes, rows);
    out.shared_bytes = bytes(tiling, batch_tile);
    if (out.shared_bytes > device.shared_bytes) return false;
    out.fill = static_cast<int>(tiling.fill);
    out.rows = tiling.rows, out.filled_tiles = tiling.filled_tiles, out.tiles = tiling.tiles;
    out.gathered_rows = tiling.gathered_rows, out.places = tiling.places,
    out.stages = tiling.stages;
    out.batch_tile = batch_tile;
    out.batch_tiles = static_cast<int>((batch + batch_tile - 1) / batch_tile);
    if (out.batch_tiles > kMaxGridZ) {
      throw std::runtime_error("batch: got " + std::to_string(batch) +
                               " rows, which make more tiles than a launch may have");
    }
    out.splits = splits_of(int64_t{out.tiles} * out.batch_tiles, law.blocks, device.sms);
    return true;
  };
  const int first = batch == 1 ? 1 : batch <= 8 ? 8 : batch <= 16 ? 16 : largest;
  // Windows, in steps of the batch that are not too small, in tiles as large as may be, in three
  // stages or in two.
  for (int tile = first; tile >= (first < 8 ? first : 8); tile /= 2) {
    for (int rows = kMaxRows; rows >= kMaxRows / 4; rows /= 2) {
      for (int stages = kStages; stages >= 2; --stages) {
        const int max_bytes = device.shared_bytes / stages;
        const Tiling tiling = tiling_of_windows(law, row_bytes, max_bytes, rows);
        if (tiling.fill == Fill::kWindows && fits(tile, stages, max_bytes, rows)) return out;
      }
    }
  }
  // Anything: first what leaves little for all else, then a quarter of the memory and less.
  for (int tile = first;; tile = tile == 8 ? 1 : tile / 2) {
    const int third = device.shared_bytes / kStages, quarter = device.shared_bytes / (kStages + 1);
    for (int max_bytes = third; max_bytes >= 64 * row_bytes;
         max_bytes = max_bytes == third ? quarter : max_bytes / 2) {
      if (fits(tile, kStages, max_bytes, kMaxRows)) return out;
    }
    if (tile == 1) break;
  }
  throw std::runtime_error("shared memory: got " + std::to_string(device.shared_bytes) +
                           " bytes for a CTA, which hold no stage of 64 blocks");
}

}  // namespace rpg::RPG_DEVICE
