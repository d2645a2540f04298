// The units of a layer with their windows, and what else the kernels of the unit law share.

#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <algorithm>
#include <vector>

#include "cpu/bank.h"
#include "cpu/product.h"
#include "cpu/unit_entries.h"

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

alignas(8) constexpr float kSigns[2] = {1.f, -1.f};

// Lanes of a tile with so many rows: a power of two from 8, or from a vector, to `limit`.
inline int lanes_for(int64_t rows, int limit) {
  int lanes = kVector < 8 ? 8 : kVector;
  while (lanes < rows && lanes < limit) lanes *= 2;
  return lanes < limit ? lanes : limit;
}

inline int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// The slots of a window that the bank has, as `window_pairs` gives them.
inline void stored_pairs(const Ring& ring, int64_t first, int64_t count, int valid, uint16_t* out) {
  for_present(ring, first, count, [&](int64_t k, int64_t slot) {
    uint16_t* target = out + k * ring.block;
    if (ring.dtype == Dtype::kBfloat16) {
      std::memcpy(target, ring.find(slot), sizeof(uint16_t) * ring.block);
    } else {
      alignas(64) float row[128];
      read_slot(ring, slot, ring.block, row);
      convert_to<Bfloat16>(row, ring.block, target);
    }
    if (valid % 2) target[valid] = 0;
  });
}

// Pairs of the first `valid` elements of slots, as far as the bank has them, in rows of block / 2
// words: the bank's own where it is bfloat16, has them in one piece and no half of a word is to be
// left out. Otherwise in `buffer` [count, block / 2], rounded where the bank is no bfloat16, an odd
// last element beside a zero.
inline PairFactor window_pairs(const Ring& ring, int64_t first, int64_t count, int valid,
                               uint32_t* buffer) {
  const int64_t words = ring.block / 2;
  if (!ring.plain()) {
    stored_pairs(ring, first, count, valid, reinterpret_cast<uint16_t*>(buffer));
    return {buffer, words, 1};
  }
  const char* data = static_cast<const char*>(ring.data);
  const bool aligned = reinterpret_cast<uintptr_t>(data) % sizeof(uint32_t) == 0;
  const bool stored = ring.dtype == Dtype::kBfloat16;
  if (stored && aligned && first + count <= ring.slots && valid % 2 == 0) {
    return {reinterpret_cast<const uint32_t*>(data + first * ring.row_bytes()), words, 1};
  }
  uint16_t* out = reinterpret_cast<uint16_t*>(buffer);
  for (int64_t done = 0; done < count;) {
    const int64_t size = std::min(count - done, ring.slots - first), elements = size * ring.block;
    uint16_t* target = out + done * ring.block;
    if (stored) {
      std::memcpy(target, ring.slot(first), sizeof(uint16_t) * elements);
    } else {
      convert_to<Bfloat16>(static_cast<const float*>(ring.data) + first * ring.block,
                           static_cast<int>(elements), target);
    }
    done += size;
    first = 0;
  }
  for (int64_t i = 0; valid % 2 && i < count; ++i) out[i * ring.block + valid] = 0;
  return {buffer, words, 1};
}

// A unit with its window.
struct PlannedUnit {
  Unit unit;
  UnitWindow window;
};

// All units of a layer of one band, [groups, columns], and what bounds their sizes.
struct UnitPlan {
  UnitBand band;
  std::vector<PlannedUnit> units;
  int64_t most_octets;  // of rows of a unit
  int64_t most_window;  // octets of a window

  explicit UnitPlan(const LayerLaw& law) : band(make_unit_band(law, 0)) {
    most_octets = group_size(band, 0) * int64_t{band.taps};
    most_window = (most_octets + 2 * int64_t{law.laps} - 2) / law.laps;
    units.resize(int64_t{band.groups} * band.columns);
    constexpr uint32_t kLanes = 16;
    for (uint32_t begin = 0; begin < band.columns; begin += kLanes) {
      uint32_t column[kLanes], place[kLanes], turn[kLanes];
      for (uint32_t l = 0; l < kLanes; ++l) column[l] = min_u32(begin + l, band.columns - 1);
      places_of(band, column, place, turn);
      const uint32_t count = min_u32(band.columns - begin, kLanes);
      for (uint32_t group = 0; group < band.groups; ++group) {
        for (uint32_t l = 0; l < count; ++l) {
          const Unit unit = unit_in_place(band, column[l], group, place[l], turn[l]);
          units[int64_t{group} * band.columns + column[l]] = {unit, rpg::window_of(band, unit)};
        }
      }
    }
  }
  // What it takes beside a workspace, and counts as scratch.
  int64_t bytes() const { return static_cast<int64_t>(units.size() * sizeof(PlannedUnit)); }
  const PlannedUnit& unit_of(uint32_t group, uint32_t column) const {
    return units[int64_t{group} * band.columns + column];
  }
};

}  // namespace
}  // namespace rpg
