// A layer's positions in the order in which factored kernels take them: strips of rows, in a strip
// column by column, in a column row by row. Each piece of a column comes with what it reads.
//
// A piece is rows of one block column that lie below each other in one strip and read one window of
// the ring, or under law 1 the whole ring: what a ColumnPiece and a UnitPiece (law/window.h) have
// in common.

#pragma once

#include <algorithm>
#include <vector>

#include "cpu/unit_table.h"

namespace rpg {

// Rows that are walked together.
struct Strip {
  int64_t band;
  int64_t row;     // of the layer
  int64_t first;   // positions of the strips before
  int64_t height;  // rows
};

// A piece has `count` rows of column `block`, from row `row` of the strip. Its row i reads place
// entry[i] of the `slots` slots that begin at slot `base` of the ring and wrap around it.
template <class Entry>
struct Piece {
  const Strip* strip;
  int64_t block;
  int64_t row;
  int count;
  const Entry* entry;
  uint32_t base;
  int slots;
};

namespace {  // compiled once per instruction set, see law/ring.h

// Law 2: strips are those of the law, and a piece reads one window.
class WindowWalk {
 public:
  using Entry = uint16_t;
  static constexpr int64_t kEntries = kStrip;  // of the buffer that `walk` is given

  explicit WindowWalk(const LayerLaw& law) : law_(law), band_(make_window_band(law, 0)) {}

  static int64_t height(int64_t, int64_t left) {
    int64_t height = kStrip;
    while (height > left) height /= 2;
    return height;
  }

  // Calls visit(piece) for the columns of blocks from `low` to `high` of a strip.
  template <class Visit>
  void walk(const Strip& strip, int64_t low, int64_t high, Entry* entry, const Visit& visit) {
    if (strip.band != number_) band_ = make_window_band(law_, number_ = strip.band);
    // Positions of the band.
    const int64_t first = (strip.row - strip.band * law_.rows_per_band) * law_.blocks;
    const int64_t end = first + high * strip.height;
    for (int64_t p = first + low * strip.height; p < end;) {
      const UnitPiece unit_piece = unit_piece_with(static_cast<uint32_t>(p));
      int64_t count = int64_t{unit_piece.p} + unit_piece.count - p;
      if (count > end - p) count = end - p;
      if (count > kEntries) count = kEntries;
      const uint32_t z = unit_piece.z + (static_cast<uint32_t>(p) - unit_piece.p);
      walk(strip, static_cast<uint32_t>(p), z, static_cast<uint32_t>(count), entry, visit);
      p += count;
    }
  }

  // Calls visit(piece) for `count` positions from p on, which lie in this strip and in one unit,
  // and whose addresses begin with z.
  template <class Visit>
  void walk(const Strip& strip, uint32_t p, uint32_t z, uint32_t count, Entry* entry,
            const Visit& visit) const {
    unit_table(band_, p, z, count, entry);
    const uint32_t window = band_.scramble.window;
    const uint32_t base = window_base(band_, z);
    int64_t rest = int64_t{p} - (strip.row - strip.band * law_.rows_per_band) * law_.blocks;
    for (uint32_t done = 0; done < count;) {
      const int64_t row = rest % strip.height;
      const int64_t size = std::min<int64_t>(strip.height - row, count - done);
      visit(Piece<Entry>{&strip, rest / strip.height, row, static_cast<int>(size), entry + done,
                         base, static_cast<int>(window)});
      done += static_cast<uint32_t>(size);
      rest += size;
    }
  }

 private:
  UnitPiece unit_piece_with(uint32_t p) const {
    if (p < band_.head) return unit_piece_at(band_, 0);
    return unit_piece_at(band_, 1 + divide(p - band_.head, band_.by_cell));
  }

  const LayerLaw& law_;
  WindowBand band_;
  int64_t number_ = 0;
};

// Law 1: strips are as high as the caller likes, and a piece may read the whole ring.
class RingWalk {
 public:
  using Entry = uint32_t;
  static constexpr int64_t kEntries = 16384;

  explicit RingWalk(const LayerLaw& law) : law_(law), band_(make_band_law(law, 0)) {}

  static int64_t height(int64_t max_rows, int64_t left) {
    return left < max_rows ? left : max_rows;
  }

  // Calls visit(piece) for the columns of blocks from `low` to `high` of a strip.
  template <class Visit>
  void walk(const Strip& strip, int64_t low, int64_t high, Entry* entry, const Visit& visit) {
    if (strip.band != number_) band_ = make_band_law(law_, number_ = strip.band);
    const int64_t first = strip.row - strip.band * law_.rows_per_band;
    for (int64_t block = low; block < high; ++block) {
      for (int64_t row = 0; row < strip.height; row += kEntries) {
        const int count = static_cast<int>(std::min(strip.height - row, kEntries));
        tabulate(first + row, block, count, entry);
        visit(Piece<Entry>{&strip, block, row, count, entry, 0, static_cast<int>(law_.slots)});
      }
    }
  }

 private:
  void tabulate(int64_t row, int64_t block, int count, Entry* entry) const {
    constexpr int kLanes = 64;
    for (int done = 0; done < count; done += kLanes) {
      uint32_t q[kLanes], word[kLanes];
      const uint32_t first = static_cast<uint32_t>((row + done) * law_.blocks + block);
      const uint32_t step = static_cast<uint32_t>(law_.blocks);
      const int size = count - done < kLanes ? count - done : kLanes;
      for (int l = 0; l < kLanes; ++l) q[l] = l < size ? first + l * step : 0;
      if (law_.reflect == Reflect::kVector) {
        sign_words_of(band_, 0, q, word);
      } else {
        for (int l = 0; l < kLanes; ++l) word[l] = 0;
      }
      slots_of(band_, q);
      for (int l = 0; l < size; ++l) entry[done + l] = q[l] | (word[l] & 0x80000000u);
    }
  }

  const LayerLaw& law_;
  BandLaw band_;
  int64_t number_ = 0;
};

// The strips of a layer; `max_rows` rows at most where the law leaves that open.
template <class Walk>
std::vector<Strip> strips_of(const LayerLaw& law, int64_t max_rows) {
  std::vector<Strip> out;
  int64_t first = 0;
  for (int64_t band = 0; band < bands_of(law); ++band) {
    const int64_t end = band + 1 == bands_of(law) ? law.rows : (band + 1) * law.rows_per_band;
    for (int64_t row = band * law.rows_per_band; row < end;) {
      const int64_t height = Walk::height(max_rows, end - row);
      out.push_back({band, row, first, height});
      row += height;
      first += height * law.blocks;
    }
  }
  return out;
}

// The position, at the beginning of a column, at which part `part` of `parts` begins.
inline int64_t column_split(const std::vector<Strip>& strips, int64_t blocks, int64_t part,
                            int64_t parts) {
  const Strip& last = strips.back();
  const int64_t total = last.first + last.height * blocks;
  // total * part may pass 2^63.
  const int64_t wanted = total / parts * part + total % parts * part / parts;
  for (const Strip& strip : strips) {
    if (wanted < strip.first + strip.height * blocks) {
      return strip.first + (wanted - strip.first) / strip.height * strip.height;
    }
  }
  return total;
}

}  // namespace
}  // namespace rpg
