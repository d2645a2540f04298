// A layer's positions, by law 1, in the order in which factored kernels take them: strips of rows,
// in a strip column by column, in a column row by row. Each piece of a column comes with what its
// rows read.

#pragma once

#include <algorithm>
#include <vector>

#include "law/layer.h"

namespace rpg {

// Rows that are walked together.
struct Strip {
  int64_t band;
  int64_t row;     // of the layer
  int64_t first;   // positions of the strips before
  int64_t height;  // rows
};

// A piece has `count` rows of column `block`, from row `row` of the strip. Its row i reads the slot
// of entry[i], whose top bit is the sign.
struct Piece {
  const Strip* strip;
  int64_t block;
  int64_t row;
  int count;
  const uint32_t* entry;
};

namespace {  // compiled once per instruction set, see law/ring.h

class Walk {
 public:
  static constexpr int64_t kEntries = 16384;  // of the buffer that `walk` is given

  explicit Walk(const LayerLaw& law) : law_(law), band_(make_band_law(law, 0)) {}

  // Calls visit(piece) for the columns of blocks from `low` to `high` of a strip.
  template <class Visit>
  void walk(const Strip& strip, int64_t low, int64_t high, uint32_t* entry, const Visit& visit) {
    if (strip.band != number_) band_ = make_band_law(law_, number_ = strip.band);
    const int64_t first = strip.row - strip.band * law_.rows_per_band;
    for (int64_t block = low; block < high; ++block) {
      for (int64_t row = 0; row < strip.height; row += kEntries) {
        const int count = static_cast<int>(std::min(strip.height - row, kEntries));
        tabulate(first + row, block, count, entry);
        visit(Piece{&strip, block, row, count, entry});
      }
    }
  }

 private:
  void tabulate(int64_t row, int64_t block, int count, uint32_t* entry) const {
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

// The strips of a layer, of at most `max_rows` rows.
inline std::vector<Strip> strips_of(const LayerLaw& law, int64_t max_rows) {
  std::vector<Strip> out;
  int64_t first = 0;
  for (int64_t band = 0; band < bands_of(law); ++band) {
    const int64_t end = band + 1 == bands_of(law) ? law.rows : (band + 1) * law.rows_per_band;
    for (int64_t row = band * law.rows_per_band; row < end;) {
      const int64_t height = std::min(end - row, max_rows);
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
