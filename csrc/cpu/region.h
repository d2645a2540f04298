// The positions of a layer that one call is about, walked in virtual-matrix order.

#pragma once

#include <cstdint>

#include "law/window.h"

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

// Which elements of a run's blocks are in memory: `first` to `first + length`, as rows [rows ·
// runs, length]. So a part of a run's first and of its last block may be cut off.
struct Cut {
  int64_t first;
  int64_t length;
};

namespace {  // compiled once per instruction set, see law/ring.h

// Elements `low` to `high` of a block lie in memory from element `begin`.
struct CutBlock {
  int64_t begin;
  int low, high;
};

inline CutBlock cut_block(const Region& region, const Cut& cut, int64_t position, int block) {
  const int64_t row = position / region.count;
  const int64_t begin = (position - row * region.count) * block - cut.first;
  const int64_t low = begin < 0 ? -begin : 0;
  const int64_t high = cut.length - begin < block ? cut.length - begin : block;
  return {row * cut.length + begin + low, static_cast<int>(low), static_cast<int>(high)};
}

inline int64_t positions_of(const Region& region) {
  return region.rows * region.runs * region.count;
}

// The law of one band, whichever it is: without a window it has what BandLaw has.
inline WindowBand make_any_band(const LayerLaw& law, int64_t band) {
  if (law.window) return make_window_band(law, band);
  WindowBand out{};
  static_cast<BandLaw&>(out) = make_band_law(law, band);
  return out;
}

template <int LANES>
inline void any_slots_of(const WindowBand& law, uint32_t (&q)[LANES]) {
  if (law.scramble.window) {
    slots_of(law, q);
  } else {
    slots_of(static_cast<const BandLaw&>(law), q);
  }
}

template <int LANES>
inline void any_sign_words_of(const WindowBand& law, int w, const uint32_t (&q)[LANES],
                              uint32_t (&word)[LANES]) {
  if (law.scramble.window) {
    sign_words_of(law, w, q, word);
  } else {
    sign_words_of(static_cast<const BandLaw&>(law), w, q, word);
  }
}

// In the law without windows whole rows of one band are consecutive positions: they are walked as
// one row of one run.
inline Region merged(const LayerLaw& law, Region region) {
  if (region.count == region.run_blocks) {
    region.count = region.run_blocks = law.blocks;
    region.runs = 1;
    if (!region.lookup && bands_of(law) == 1 && !law.window) {
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
  const WindowBand& band_law() const { return band_law_; }

  // Writes the q (of the window law: p) of up to LANES following positions, at most `left`, all of
  // one band, and says how many. What is left of q is 0, so that it can be evaluated and ignored.
  template <int LANES>
  int next(int64_t left, uint32_t (&q)[LANES]) {
    int filled = 0;
    while (filled < LANES && filled < left) {
      const int64_t n = region_.first_row + (region_.lookup ? region_.lookup[row_] : row_);
      const int64_t band = bands_ == 1 ? 0 : n / law_.rows_per_band;
      if (band != band_) {
        if (filled) break;
        band_ = band;
        band_law_ = make_any_band(law_, band);
      }
      const int64_t row = n - band * law_.rows_per_band;
      const int64_t block = run_ * region_.run_blocks + region_.low + column_;
      uint32_t first = static_cast<uint32_t>(row * law_.blocks + block), step = 1;
      if (law_.window) {  // a row of a strip: its columns lie the strip's height apart
        first = order(band_law_, static_cast<uint32_t>(row), static_cast<uint32_t>(block));
        step = strip_height(static_cast<uint32_t>(row), band_law_.rows);
      }
      int64_t take = LANES - filled;
      if (take > left - filled) take = left - filled;
      if (take > region_.count - column_) take = region_.count - column_;
      for (int k = 0; k < static_cast<int>(take); ++k) {
        q[filled + k] = first + static_cast<uint32_t>(k) * step;
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
  WindowBand band_law_;
};

}  // namespace
}  // namespace rpg
