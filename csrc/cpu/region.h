// The positions of a layer that one call is about, walked in virtual-matrix order.

#pragma once

#include <cstdint>
#include <cstring>
#include <memory>

#include "law/layer.h"

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
  UnitBand unit;
};

// Calls function(law of the band) with the member that is set.
template <class Function>
inline void with_band(const LayerLaw& law, const AnyBand& band, const Function& function) {
  if (law.taps) {
    function(band.unit);
  } else {
    function(band.ring);
  }
}

inline AnyBand make_any_band(const LayerLaw& law, int64_t band) {
  AnyBand out{};
  if (law.taps) {
    out.unit = make_unit_band(law, band);
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
    if (!region.lookup && bands_of(law) == 1 && !law.taps) {
      region.low = region.first_row * law.blocks;
      region.count = region.rows * law.blocks;
      region.first_row = 0;
      region.rows = 1;
    }
  }
  return region;
}

// Of the unit law: the octets that lie side by side in the columns of a region, which are its
// blocks, run by run. A lone position takes hundreds of instructions, but most of them are those of
// its column, which are done once for all rows of a band, or of its octet, once for 8 rows. What
// does not fit the memory, in longer rows, is evaluated anew for each row.
class OctetRow {
 public:
  OctetRow(const LayerLaw& law, const Region& region) {
    if (!law.taps) return;
    run_blocks_ = static_cast<uint32_t>(region.run_blocks);
    low_ = static_cast<uint32_t>(region.low);
    by_count_ = make_divider(static_cast<uint32_t>(region.count));
    capacity_ = min_u32(static_cast<uint32_t>(region.runs * region.count), kMostColumns);
    memory_.reset(new uint32_t[kTables * (capacity_ + kChunk)]);
  }

  void begin_band() { octet_ = kNone, evaluated_ = begin_; }

  // Writes p and slot of `count` columns of row n of the band.
  void read(const UnitBand& law, uint32_t n, uint32_t column, uint32_t count,
            uint32_t* __restrict p, uint32_t* __restrict slot) {
    const bool changed = n / kOctet != octet_;
    octet_ = n / kOctet;
    if (column < begin_ || column + count > begin_ + capacity_ || (changed && column != begin_)) {
      begin_ = evaluated_ = end_ = column;
    } else if (changed) {
      end_ = begin_;
    }
    for (; evaluated_ < column + count; evaluated_ += kChunk) add_columns(law);
    for (; end_ < column + count; end_ += kChunk) add_octets(law);
    const uint32_t row = n % kOctet;
    const uint32_t* __restrict q = table(kQ, column);
    const uint32_t* __restrict use = table(kUse, column);
    const uint32_t* __restrict word = table(kWord, column);
    for (uint32_t k = 0; k < count; ++k) {
      p[k] = q[k] * kOctet + row;
      slot[k] = slot_of_use(law, use[k], residue_of(row, word[k]));
    }
  }

 private:
  static constexpr uint32_t kNone = ~0u;
  static constexpr uint32_t kChunk = 16;             // columns that are evaluated at once
  static constexpr uint32_t kMostColumns = 1 << 14;  // 448 KiB, which a second cache holds

  // Of a column: its number in the law, its tap of the unit, which column's place it has, the octet
  // that comes first; of an octet: q, use and word.
  enum Table { kColumn, kTap, kPlace, kTurn, kQ, kUse, kWord, kTables };

  uint32_t* table(Table number, uint32_t column) const {
    return memory_.get() + number * (capacity_ + kChunk) + column - begin_;
  }

  void add_columns(const UnitBand& law) {
    const uint32_t begin = evaluated_;
    const uint32_t run_blocks = run_blocks_, low = low_;
    const Divider by_count = by_count_;
    uint32_t column[kChunk], tap[kChunk], place[kChunk], turn[kChunk];
    for (uint32_t l = 0; l < kChunk; ++l) {
      // Beyond the last column this is nonsense, which nothing reads.
      const uint32_t c = begin + l, run = divide(c, by_count);
      const uint32_t b = run * run_blocks + low + c - run * by_count.divisor;
      const uint32_t tap_of_layer = divide(b, law.by_run_blocks);
      const uint32_t part = divide(tap_of_layer, law.by_taps);
      column[l] = part * law.run_blocks + b - tap_of_layer * law.run_blocks;
      tap[l] = tap_of_layer - part * law.taps;
    }
    places_of(law, column, place, turn);
    std::memcpy(table(kColumn, begin), column, sizeof column);
    std::memcpy(table(kTap, begin), tap, sizeof tap);
    std::memcpy(table(kPlace, begin), place, sizeof place);
    std::memcpy(table(kTurn, begin), turn, sizeof turn);
  }

  // As slots_of, but that one group, and so one size of units, is that of all.
  void add_octets(const UnitBand& law) {
    const uint32_t octet = octet_, group = group_of(law, octet), first = first_octet(law, group);
    const uint32_t rows = group_size(law, group), size = rows * law.taps;
    const uint32_t* __restrict column = table(kColumn, end_);
    const uint32_t* __restrict tap = table(kTap, end_);
    const uint32_t* __restrict place = table(kPlace, end_);
    const uint32_t* __restrict turn = table(kTurn, end_);
    uint32_t unit[kChunk], i[kChunk], q[kChunk], use[kChunk], word[kChunk];
    for (uint32_t l = 0; l < kChunk; ++l) {
      unit[l] = column[l] * law.groups + group;
      i[l] = tap[l] * rows + octet - first;
      q[l] = (column[l] * law.octets + first) * law.taps + i[l];
      // Every row is its own residue of the word 0.
      word[l] = law.permute ? hash_word(q[l], law.octet_key[0], law.octet_key[1]) : 0;
    }
    for (int j = 0; law.permute && j < kShuffleRounds; ++j) {
      for (uint32_t l = 0; l < kChunk; ++l) {
        i[l] = shuffle_round(i[l], size, round_of(law, unit[l], size, j));
      }
    }
    for (uint32_t l = 0; l < kChunk; ++l) {
      const uint32_t turned = sub_mod(first, turn[l], law.octets);
      use[l] = (place[l] * law.octets + turned) * law.taps + law.offset + i[l];
    }
    std::memcpy(table(kQ, end_), q, sizeof q);
    std::memcpy(table(kUse, end_), use, sizeof use);
    std::memcpy(table(kWord, end_), word, sizeof word);
  }

  uint32_t run_blocks_ = 0, low_ = 0, capacity_ = 0;
  Divider by_count_{};
  uint32_t octet_ = kNone;  // of the band
  // Tables hold columns from `begin_`: to `evaluated_` those of columns, to `end_` those of octets.
  uint32_t begin_ = 0, evaluated_ = 0, end_ = 0;
  std::unique_ptr<uint32_t[]> memory_;  // [kTables, capacity_ + kChunk]
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
        octets_.begin_band();
      }
      int64_t take = LANES - filled;
      if (take > left - filled) take = left - filled;
      if (take > region_.count - column_) take = region_.count - column_;
      read(n, static_cast<uint32_t>(take), p + filled, slot + filled);
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
    slots_of(band_law_.ring, slot);
    return filled;
  }

  // Sign words of positions that the last `next` wrote.
  template <int LANES>
  void sign_words(int w, const uint32_t (&p)[LANES], uint32_t (&word)[LANES]) const {
    with_band(law_, band_law_, [&](const auto& band) { sign_words_of(band, w, p, word); });
  }

 private:
  // p of `count` blocks of row n that lie beside each other, and of the unit law their slots.
  void read(int64_t n, uint32_t count, uint32_t* p, uint32_t* slot) {
    const uint32_t row = static_cast<uint32_t>(n - band_ * law_.rows_per_band);
    if (law_.taps) {
      const uint32_t column = static_cast<uint32_t>(run_ * region_.count + column_);
      octets_.read(band_law_.unit, row, column, count, p, slot);
      return;
    }
    const int64_t b = run_ * region_.run_blocks + region_.low + column_;
    const uint32_t first = static_cast<uint32_t>(row * law_.blocks + b);
    for (uint32_t k = 0; k < count; ++k) p[k] = first + k;
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
