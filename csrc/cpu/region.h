// The positions of a layer that one call is about, walked in virtual-matrix order.

#pragma once

#include <cstdint>

#include "../law.h"

namespace rpg {

// `rows` rows, and in each of their `runs` runs of `run_blocks` blocks the `count` blocks from
// block `low`. Row r is first_row + r, or first_row + lookup[r].
struct Region {
  int64_t first_row;
  int64_t rows;
  const int64_t* lookup;  // [rows] or null
  int64_t runs;
  int64_t run_blocks;
  int64_t low;
  int64_t count;
};

namespace {  // compiled once per instruction set, see law.h

inline int64_t positions_of(const Region& region) {
  return region.rows * region.runs * region.count;
}

// Whole rows of one band are consecutive positions: walk them as one run.
inline Region merged(const LayerLaw& law, Region region) {
  if (region.count == region.run_blocks) {
    region.count = region.run_blocks = law.blocks;
    region.runs = 1;
    if (!region.lookup && bands_of(law) == 1) {
      region.low = region.first_row * law.blocks;
      region.count = region.rows * law.blocks;
      region.first_row = 0;
      region.rows = 1;
    }
  }
  return region;
}

class Cursor {
 public:
  Cursor(const LayerLaw& law, const Region& region, int64_t position)
      : law_(law), region_(region), bands_(bands_of(law)) {
    column_ = position % region.count;
    run_ = position / region.count % region.runs;
    row_ = position / region.count / region.runs;
  }

  // The law of the band that the last `next` was about.
  const BandLaw& band_law() const { return band_law_; }

  // Writes the q of up to LANES following positions, at most `left`, all of one band, and says
  // how many. What is left of q is 0, so that it can be evaluated and ignored.
  template <int LANES>
  int next(int64_t left, uint32_t (&q)[LANES]) {
    int filled = 0;
    while (filled < LANES && filled < left) {
      const int64_t n = region_.first_row + (region_.lookup ? region_.lookup[row_] : row_);
      const int64_t band = bands_ == 1 ? 0 : n / law_.rows_per_band;
      if (band != band_) {
        if (filled) break;
        band_ = band;
        band_law_ = make_band_law(law_, band);
      }
      const int64_t first = (n - band * law_.rows_per_band) * law_.blocks +
                            run_ * region_.run_blocks + region_.low + column_;
      int64_t take = LANES - filled;
      if (take > left - filled) take = left - filled;
      if (take > region_.count - column_) take = region_.count - column_;
      for (int k = 0; k < static_cast<int>(take); ++k) {
        q[filled + k] = static_cast<uint32_t>(first) + static_cast<uint32_t>(k);
      }
      filled += static_cast<int>(take);
      column_ += take;
      if (column_ == region_.count) {
        column_ = 0;
        if (++run_ == region_.runs) {
          run_ = 0;
          ++row_;
        }
      }
    }
    for (int k = filled; k < LANES; ++k) q[k] = 0;
    return filled;
  }

 private:
  const LayerLaw& law_;
  const Region& region_;
  int64_t bands_;
  int64_t row_, run_, column_;
  int64_t band_ = -1;
  BandLaw band_law_;
};

}  // namespace
}  // namespace rpg
