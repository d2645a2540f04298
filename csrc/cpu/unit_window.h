// The window of a unit as products want it: contiguous rows of fp32.

#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <algorithm>
#include <vector>

#include "cpu/lanes.h"
#include "cpu/product.h"
#include "cpu/unit_entries.h"

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

inline int64_t lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

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

// The bank: `slots` rows of `block` elements.
struct Ring {
  Dtype dtype;
  const void* data;
  int64_t slots;
  int block;
  const char* slot(int64_t i) const { return static_cast<const char*>(data) + i * row_bytes(); }
  int64_t row_bytes() const { return int64_t{block} * (dtype == Dtype::kFloat32 ? 4 : 2); }
};

// Rows of `count` slots from `first` on, around the end of the ring: the ring's own where it is
// fp32 and has them in one piece, otherwise converted into `buffer` [count, block].
inline const float* window_rows(const Ring& ring, int64_t first, int64_t count, float* buffer) {
  const char* data = static_cast<const char*>(ring.data);
  const int64_t bytes = ring.row_bytes();
  if (ring.dtype == Dtype::kFloat32 && first + count <= ring.slots) {
    return reinterpret_cast<const float*>(data + first * bytes);
  }
  for (int64_t done = 0; done < count;) {
    const int64_t size = std::min(count - done, ring.slots - first);
    read_some(ring.dtype, data + first * bytes, static_cast<int>(size * ring.block),
              buffer + done * ring.block);
    done += size;
    first = 0;
  }
  return buffer;
}

// A unit of one tap, with its window.
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
    units.reserve(int64_t{band.groups} * band.columns);
    for (uint32_t group = 0; group < band.groups; ++group) {
      for (uint32_t column = 0; column < band.columns; ++column) {
        const Unit unit = unit_at(band, column, group);
        units.push_back({unit, rpg::window_of(band, unit)});
      }
    }
  }
  const PlannedUnit& unit_of(uint32_t group, uint32_t column) const {
    return units[int64_t{group} * band.columns + column];
  }
};

}  // namespace
}  // namespace rpg
