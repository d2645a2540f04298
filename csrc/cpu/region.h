// The positions of a layer that one call is about, walked in virtual-matrix order.

#pragma once

#include <cstdint>
#include <memory>

#include "law/unit.h"
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

// The law of one band, whichever it is: of these members the layer's law sets one.
struct AnyBand {
  BandLaw ring;
  WindowBand window;
  UnitBand unit;
};

// Calls function(law of the band) with the member that is set.
template <class Function>
inline void with_band(const LayerLaw& law, const AnyBand& band, const Function& function) {
  if (law.taps) {
    function(band.unit);
  } else if (law.window) {
    function(band.window);
  } else {
    function(band.ring);
  }
}

inline AnyBand make_any_band(const LayerLaw& law, int64_t band) {
  AnyBand out{};
  if (law.taps) {
    out.unit = make_unit_band(law, band);
  } else if (law.window) {
    out.window = make_window_band(law, band);
  } else {
    out.ring = make_band_law(law, band);
  }
  return out;
}

// In the first law whole rows of one band are consecutive positions: they are walked as one row of
// one run.
inline Region merged(const LayerLaw& law, Region region) {
  if (region.count == region.run_blocks) {
    region.count = region.run_blocks = law.blocks;
    region.runs = 1;
    if (!region.lookup && bands_of(law) == 1 && !law.window && !law.taps) {
      region.low = region.first_row * law.blocks;
      region.count = region.rows * law.blocks;
      region.first_row = 0;
      region.rows = 1;
    }
  }
  return region;
}

// Of the unit law: the octets that lie side by side in the columns of a region. They are evaluated
// once for their 8 rows, since an octet takes 400 instructions and one of its positions 40. Columns
// are those of the region: its blocks, run by run. Longer rows than the memory holds are evaluated
// anew for each row.
class OctetRow {
 public:
  OctetRow(const LayerLaw& law, const Region& region) {
    if (!law.taps) return;
    columns_ = static_cast<uint32_t>(region.runs * region.count);
    run_blocks_ = static_cast<uint32_t>(region.run_blocks);
    low_ = static_cast<uint32_t>(region.low);
    by_count_ = make_divider(static_cast<uint32_t>(region.count));
    most_ = min_u32(columns_, kMostColumns);
    memory_.reset(new uint32_t[3 * (most_ + kChunk)]);
    q_ = memory_.get();
    use_ = q_ + most_ + kChunk;
    word_ = use_ + most_ + kChunk;
  }

  // Writes p and slot of `count` columns of row n of the layer, which is row n_in_band of the band.
  void read(const UnitBand& law, int64_t n, uint32_t n_in_band, uint32_t column, int count,
            uint32_t* __restrict p, uint32_t* __restrict slot) {
    if (n / kOctet != octet_ || column < begin_ || column > end_ ||
        column + count > begin_ + most_) {
      octet_ = n / kOctet;
      begin_ = end_ = column;
    }
    while (end_ < column + count) add_octets(law, n_in_band / kOctet);
    const uint32_t first = column - begin_, row = n_in_band % kOctet;
    const uint32_t* __restrict q = q_ + first;
    const uint32_t* __restrict use = use_ + first;
    const uint32_t* __restrict word = word_ + first;
    for (int k = 0; k < count; ++k) {
      p[k] = q[k] * kOctet + row;
      slot[k] = slot_of_use(law, use[k], residue_of(row, word[k]));
    }
  }

 private:
  static constexpr uint32_t kChunk = 32;             // octets that are evaluated at once
  static constexpr uint32_t kMostColumns = 1 << 14;  // 192 KiB, which a second cache holds

  // What slots_of does for lone positions, here with one group, and so one size of units, for all.
  void add_octets(const UnitBand& law, uint32_t octet) {
    const uint32_t group = group_of(law, octet), first = first_octet(law, group);
    const uint32_t rows = group_size(law, group), begin = end_, last = columns_ - 1;
    const uint32_t run_blocks = run_blocks_, low = low_;
    const Divider by_count = by_count_;
    uint32_t column[kChunk], place[kChunk], turned[kChunk], i[kChunk], q[kChunk], word[kChunk];
    for (uint32_t l = 0; l < kChunk; ++l) {
      const uint32_t c = min_u32(begin + l, last), run = divide(c, by_count);
      const uint32_t b = run * run_blocks + low + c - run * by_count.divisor;
      const uint32_t tap = divide(b, law.by_run_blocks), part = divide(tap, law.by_taps);
      column[l] = part * law.run_blocks + b - tap * law.run_blocks;
      i[l] = (tap - part * law.taps) * rows + octet - first;
      q[l] = (column[l] * law.octets + first) * law.taps + i[l];
      place[l] = column[l];
      turned[l] = first;
      word[l] = 0;  // of which every row is its own residue
    }
    if (law.permute) {
      permute(law.permutation, place);
      for (uint32_t l = 0; l < kChunk; ++l) {
        const uint32_t turn = hash_word(column[l], law.turn_key[0], law.turn_key[1]);
        turned[l] = sub_mod(first, first_octet(law, umulhi(turn, law.groups)), law.octets);
        word[l] = hash_word(q[l], law.octet_key[0], law.octet_key[1]);
      }
      for (int j = 0; j < kShuffleRounds; ++j) {
        const uint32_t k0 = law.round_key[2 * j], k1 = law.round_key[2 * j + 1];
        for (uint32_t l = 0; l < kChunk; ++l) {
          const uint32_t unit = column[l] * law.groups + group;
          i[l] = shuffle_round(i[l], rows * law.taps, hash_word(unit, k0, k1));
        }
      }
    }
    const uint32_t kept = end_ - begin_;
    for (uint32_t l = 0; l < kChunk; ++l) {
      q_[kept + l] = q[l];
      use_[kept + l] = (place[l] * law.octets + turned[l]) * law.taps + law.offset + i[l];
      word_[kept + l] = word[l];
    }
    end_ += min_u32(kChunk, columns_ - end_);
  }

  uint32_t columns_ = 0, run_blocks_ = 0, low_ = 0, most_ = 0;
  Divider by_count_{};
  int64_t octet_ = -1;                  // of the layer
  uint32_t begin_ = 0, end_ = 0;        // columns that are in memory
  std::unique_ptr<uint32_t[]> memory_;  // [3, most_ + kChunk]
  uint32_t *q_ = nullptr, *use_ = nullptr, *word_ = nullptr;
};

// Walks the positions of a region.
class Cursor {
 public:
  Cursor(const LayerLaw& law, const Region& region, int64_t position)
      : law_(law), region_(region), bands_(bands_of(law)), octets_(law, region) {
    column_ = position % region.count;
    run_ = position / region.count % region.runs;
    row_ = position / region.count / region.runs;
  }

  // Writes q or p, and slots, of up to LANES following positions, at most `left`, all of one band,
  // and says how many. What is left of them is that of a position, to be evaluated and ignored.
  template <int LANES>
  int next(int64_t left, uint32_t (&p)[LANES], uint32_t (&slot)[LANES]) {
    int filled = 0;
    while (filled < LANES && filled < left) {
      const int64_t n = region_.first_row + (region_.lookup ? region_.lookup[row_] : row_);
      const int64_t band = bands_ == 1 ? 0 : n / law_.rows_per_band;
      if (band != band_) {
        if (filled) break;
        band_ = band;
        band_law_ = make_any_band(law_, band);
      }
      int64_t take = LANES - filled;
      if (take > left - filled) take = left - filled;
      if (take > region_.count - column_) take = region_.count - column_;
      read(n, static_cast<int>(take), p + filled, slot + filled);
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
    for (int l = filled; l < LANES; ++l) p[l] = slot[l] = 0;
    if (law_.taps) return filled;  // whose slots are there
    for (int l = 0; l < LANES; ++l) slot[l] = p[l];
    if (law_.window) {
      slots_of(band_law_.window, slot);
    } else {
      slots_of(band_law_.ring, slot);
    }
    return filled;
  }

  // Sign words of positions that the last `next` wrote.
  template <int LANES>
  void sign_words(int w, const uint32_t (&p)[LANES], uint32_t (&word)[LANES]) const {
    with_band(law_, band_law_, [&](const auto& band) { sign_words_of(band, w, p, word); });
  }

 private:
  // p of `count` blocks of row n that lie beside each other, and of the unit law their slots.
  void read(int64_t n, int count, uint32_t* p, uint32_t* slot) {
    const uint32_t row = static_cast<uint32_t>(n - band_ * law_.rows_per_band);
    if (law_.taps) {
      const uint32_t column = static_cast<uint32_t>(run_ * region_.count + column_);
      octets_.read(band_law_.unit, n, row, column, count, p, slot);
      return;
    }
    const int64_t b = run_ * region_.run_blocks + region_.low + column_;
    uint32_t first = static_cast<uint32_t>(row * law_.blocks + b), step = 1;
    if (law_.window) {  // a row of a strip: its columns lie the strip's height apart
      first = order(band_law_.window, row, static_cast<uint32_t>(b));
      step = strip_height(row, band_law_.window.rows);
    }
    for (int k = 0; k < count; ++k) p[k] = first + static_cast<uint32_t>(k) * step;
  }

  const LayerLaw& law_;
  const Region& region_;
  int64_t bands_;
  int64_t row_, run_, column_;
  int64_t band_ = -1;
  AnyBand band_law_;
  OctetRow octets_;
};

}  // namespace
}  // namespace rpg
