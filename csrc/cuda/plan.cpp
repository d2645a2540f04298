// How a layer is cut into tiles: on the host, in the same way for every device.

#include <stdexcept>
#include <string>

#include "cuda/linear.h"
#include "law/layer.h"

namespace rpg {

namespace {

constexpr int kMaxGridZ = 65535;  // CUDA allows no more CTAs in the third direction

// The most octets of the ring that a unit of the band reads: all have U / laps where all begin with
// an octet, otherwise one may be shared with the unit before and one with the unit after.
int window_octets(const UnitBand& law) {
  const uint32_t laps = law.by_laps.divisor, size = law.size + (law.larger > 0);
  const bool whole = !law.larger && !law.offset && size % laps == 0;
  return static_cast<int>(whole ? size / laps : (size + laps - 2) / laps + 1);
}

// Returns the tiling whose stages are windows of units; its fill is kGather where there is none.
// Groups of more than `largest` rows are cut into equal parts, each of which reads the whole
// window.
Tiling tiling_of_units(const LayerLaw& law, int stages, int largest) {
  Tiling out{};
  out.fill = Fill::kGather;
  // Signs of elements are put on blocks that belong to one row.
  if (law.reflect == Reflect::kElement || !law.taps) return out;
  const UnitBand band = make_unit_band(law, 0);
  const int octets = static_cast<int>(band.size + (band.larger > 0));
  out.parts = (octets + largest / 8 - 1) / (largest / 8);
  out.rows = 8 * ((octets + out.parts - 1) / out.parts);
  const int places = 8 * window_octets(band);
  // Where a tile reads as many blocks as it has rows, a stage of windows saves nothing.
  if (places >= out.rows || static_cast<uint32_t>(places) > law.slots) return out;
  out.fill = Fill::kWindows;
  out.tiles = static_cast<int>(band.groups) * out.parts;
  out.places = round_up(places, kMmaBlocks);
  out.stages = stages;
  return out;
}

// Returns the tiling without windows, for `stages` stages of at most `max_bytes` bytes: the whole
// ring where it fits into all of them, otherwise gathered blocks.
Tiling tiling_of_rows(const LayerLaw& law, int row_bytes, int stages, int max_bytes) {
  Tiling out{};
  out.parts = 1;
  const int64_t ring_bytes = int64_t{law.slots} * row_bytes;
  if (law.reflect != Reflect::kElement && ring_bytes <= max_bytes * int64_t{stages}) {
    out.fill = Fill::kRing;
    out.rows = kMaxRows;
    while (out.rows >= 2 * law.rows && out.rows > 64) out.rows /= 2;
    out.places = round_up(law.slots, kMmaBlocks);
    out.stages = 1;
  } else {
    out.fill = Fill::kGather;
    out.places = 2 * kThreads;
    while (out.places * row_bytes > max_bytes && out.places > 64) out.places /= 2;
    out.rows = out.places;
    out.stages = stages;
  }
  out.tiles = static_cast<int>((law.rows + out.rows - 1) / out.rows);
  return out;
}

// The start of a CTA is taken to cost as much as so many columns.
constexpr int kStartColumns = 2;

// How many CTAs share the columns of each tile, one CTA at a time on a processor: the number with
// which a processor takes the fewest columns one after the other, starts of CTAs counted too.
int splits_of(int64_t tiles, int64_t columns, int64_t sms) {
  int64_t best = 1, least = 0;
  for (int64_t splits = 1; splits <= columns && splits * tiles <= 4 * sms + tiles; ++splits) {
    const int64_t waves = (splits * tiles + sms - 1) / sms;
    const int64_t cost = waves * ((columns + splits - 1) / splits + kStartColumns);
    if (splits == 1 || cost < least) best = splits, least = cost;
  }
  return static_cast<int>(best);
}

}  // namespace

Layer layer_of(const LayerLaw& law, int64_t columns, int64_t band) {
  Layer out{};
  out.units = law.taps != 0;
  if (out.units) {
    out.unit = make_unit_band(law, band);
  } else {
    out.ring = make_band_law(law, band);
  }
  out.slots = law.slots;
  const int64_t left = law.rows - band * law.rows_per_band;
  out.rows = static_cast<int>(left < law.rows_per_band ? left : law.rows_per_band);
  out.blocks = static_cast<int>(law.blocks);
  out.block = law.granularity;
  out.columns = static_cast<int>(columns);
  out.reflect = law.reflect;
  return out;
}

Plan plan_tiles(const LayerLaw& law, int row_bytes, int64_t batch, int largest,
                const Device& device, const std::function<int(const Tiling&, int)>& bytes) {
  Plan out{};
  const auto fits = [&](const Tiling& tiling, int batch_tile) {
    out.shared_bytes = bytes(tiling, batch_tile);
    if (out.shared_bytes > device.shared_bytes) return false;
    static_cast<Tiling&>(out) = tiling;
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
        const Tiling tiling = tiling_of_units(law, stages, rows);
        if (tiling.fill == Fill::kWindows && fits(tiling, tile)) return out;
      }
    }
  }
  // Anything: first what leaves little for all else, then a quarter of the memory and less.
  for (int tile = first;; tile = tile == 8 ? 1 : tile / 2) {
    const int third = device.shared_bytes / kStages, quarter = device.shared_bytes / (kStages + 1);
    for (int max_bytes = third; max_bytes >= 64 * row_bytes;
         max_bytes = max_bytes == third ? quarter : max_bytes / 2) {
      if (fits(tiling_of_rows(law, row_bytes, kStages, max_bytes), tile)) return out;
    }
    if (tile == 1) break;
  }
  throw std::runtime_error("shared memory: got " + std::to_string(device.shared_bytes) +
                           " bytes for a CTA, which hold no stage of 64 blocks");
}

}  // namespace rpg
