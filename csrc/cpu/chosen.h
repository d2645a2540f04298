// The chosen rows and columns of a weight of the unit law, as its kernels ask for them; without a
// selection all of them are.
//
// Columns: of a block of channels only the chosen elements exist in x and dx, where they lie
// side by side. Slots of a window are *squeezed* to them, so that products shrink with them: a
// vector's chosen elements are moved to its front, and the next vector is stored behind the last of
// them. What is added to a bank gradient is spread again. A block without any takes no products
// and no additions: its columns of units are left out.
//
// Rows: only chosen rows of y are added, and of dy only they exist. Groups without any are left
// out.
//
//   squeezing a slot of 64 elements, 16 lanes: 4 loads, 4 permutations, 4 stores, 1 of zeros
//   tables: 14 bytes for each column and 4 for each row, which stay in L1 and L2

#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/selection.h"
#include "cpu/unit_window.h"

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

// Octets that so many rows fill, the last of them perhaps in part.
inline int64_t octets_for(int64_t rows) { return (rows + int64_t{kOctet} - 1) / int64_t{kOctet}; }

constexpr int kHalves = 16;  // elements of 16 bits that are squeezed at once
typedef uint16_t HalfLanes __attribute__((vector_size(2 * kHalves)));
typedef int16_t HalfOrder __attribute__((vector_size(2 * kHalves)));

// Lane i is lane order[i] of x, and zero where `order` is negative.
template <class Vector, class Order>
inline Vector picked(const Vector& x, const Order& order) {
#if defined(__clang__)
  Vector moved;
  constexpr int kLanes = sizeof(Vector) / sizeof(x[0]);
  for (int i = 0; i < kLanes; ++i) moved[i] = x[order[i] & (kLanes - 1)];
#else
  const Vector moved = __builtin_shuffle(x, order);
#endif
  return order < 0 ? Vector{} : moved;
}

// How vectors of `lanes` elements of blocks are squeezed.
template <class Index>
struct SqueezeTable {
  int lanes;
  std::vector<Index> order;        // [blocks, block]: which element comes here, of the same vector
  std::vector<uint8_t> preceding;  // [blocks, block / lanes]: how many of its block come before

  int64_t bytes() const {
    return static_cast<int64_t>(order.size() * sizeof(Index) + preceding.size());
  }
};

class Chosen {
  static constexpr int kPadTo =
      kVector < 8 ? 8 : kVector;  // elements that `padded` is a multiple of

 public:
  // `run`: elements of a run of a row, of all columns.
  Chosen(const LayerLaw& law, const UnitPlan& plan, const Selection& selection, int64_t run)
      : selection_(selection), block_(law.granularity) {
    count_rows(law.rows, plan.band.octets);
    count_columns(run, law.run_blocks);
    for (uint32_t column = 0; selection.columns && column < plan.band.columns; ++column) {
      if (count(column % law.run_blocks)) columns_.push_back(static_cast<int32_t>(column));
    }
    column_count_ = selection.columns ? static_cast<int64_t>(columns_.size()) : plan.band.columns;
    for (uint32_t group = 0; group < plan.band.groups; ++group) {
      most_rows_ = std::max(most_rows_, rows_of(plan, group));
    }
  }

  // What it takes beside a workspace, and counts as scratch.
  int64_t bytes() const {
    return static_cast<int64_t>(sizeof(int32_t) *
                                (first_row_.size() + number_of_.size() + first_column_.size() +
                                 columns_.size() + rank_.size())) +
           floats_.bytes() + halves_.bytes();
  }

  bool has_rows() const { return selection_.rows != nullptr; }
  bool has_columns() const { return selection_.columns != nullptr; }

  // Chosen rows, in all and of the largest group.
  int64_t rows() const { return first_row_.back(); }
  int64_t most_rows() const { return most_rows_; }
  // The number of the first chosen row from an octet on.
  int64_t first_row(int64_t octet) const { return first_row_[octet]; }
  int64_t rows_of(const UnitPlan& plan, uint32_t group) const {
    const int64_t first = first_octet(plan.band, group);
    return first_row_[first + group_size(plan.band, group)] - first_row_[first];
  }
  // Which row of the weight number i of the chosen ones is.
  int64_t row(int64_t i) const { return selection_.rows ? selection_.rows[i] : i; }
  // [rows, padded to octets] -> number among the chosen ones, or -1; only where there are such.
  const int32_t* number_of() const { return number_of_.data(); }

  // Columns of units with a chosen element.
  int64_t columns() const { return column_count_; }
  uint32_t column(int64_t i) const {
    return static_cast<uint32_t>(selection_.columns ? columns_[i] : i);
  }

  // Chosen elements of all blocks of a run.
  int64_t elements() const { return first_column_.back(); }
  // Of a block of a run: how many, and the number of the first.
  int count(int64_t block) const {
    return static_cast<int>(first_column_[block + 1] - first_column_[block]);
  }
  int64_t first_element(int64_t block) const { return first_column_[block]; }
  // Which element of its block number i of the chosen ones of a block is.
  int element(int64_t block, int i) const {
    if (!selection_.columns) return i;
    return static_cast<int>(selection_.columns[first_column_[block] + i] - block * block_);
  }
  // Elements that a block takes in products of whole vectors and in squares of 8, and the most that
  // any takes.
  int padded(int64_t block) const {
    return selection_.columns ? (count(block) + kPadTo - 1) / kPadTo * kPadTo : block_;
  }
  int pitch() const { return pitch_; }

  // out [slots, padded] = the chosen elements of slots [slots, block], with zeros behind them;
  // where a block is whole, the slots themselves. They may be `out`, which has room for all of
  // them.
  const float* squeezed(int64_t block, const float* slots, int64_t count_of, float* out) const {
    if (!selection_.columns || count(block) == block_) return slots;
    squeeze<Floats<kVector>, Pairs<kVector>>(floats_, block, slots, count_of, out);
    return out;
  }
  const uint16_t* squeezed(int64_t block, const uint16_t* slots, int64_t count_of,
                           uint16_t* out) const {
    if (count(block) == block_) return slots;
    squeeze<HalfLanes, HalfOrder>(halves_, block, slots, count_of, out);
    return out;
  }

  // out [block] = values [count] where they belong, and zeros elsewhere; vectors of `values` are
  // read that reach beyond its count, and not beyond its [block].
  void spread(int64_t block, const float* values, float* out) const {
    for (int e = 0; e < block_; e += kVector) store<kVector>(out + e, spread_at(block, values, e));
  }
  // target [block] += factor · values [count], spread.
  void add_spread(int64_t block, float factor, const float* values, float* target) const {
    for (int e = 0; e < block_; e += kVector) {
      const Floats<kVector> added = spread_at(block, values, e) * splat<kVector>(factor);
      store<kVector>(target + e, load<kVector>(target + e) + added);
    }
  }

 private:
  void count_rows(int64_t rows, int64_t octets) {
    first_row_.resize(octets + 1);
    for (int64_t o = 0; o <= octets; ++o) {
      first_row_[o] = static_cast<int32_t>(std::min(o * int64_t{kOctet}, rows));
    }
    if (!selection_.rows) return;
    number_of_.assign(octets * kOctet, -1);
    for (int64_t i = 0; i < selection_.row_count; ++i) {
      number_of_[selection_.rows[i]] = static_cast<int32_t>(i);
    }
    const int32_t* end = selection_.rows + selection_.row_count;
    for (int64_t o = 0; o <= octets; ++o) {
      first_row_[o] = static_cast<int32_t>(
          std::lower_bound(selection_.rows, end, o * int64_t{kOctet}) - selection_.rows);
    }
  }

  void count_columns(int64_t run, int64_t blocks) {
    first_column_.resize(blocks + 1);
    for (int64_t b = 0; b <= blocks; ++b) {
      first_column_[b] = static_cast<int32_t>(std::min(b * block_, run));
    }
    pitch_ = block_;
    if (!selection_.columns) return;
    const int32_t* end = selection_.columns + selection_.column_count;
    pitch_ = 0;
    for (int64_t b = 0; b <= blocks; ++b) {
      first_column_[b] = static_cast<int32_t>(
          std::lower_bound(selection_.columns, end, b * block_) - selection_.columns);
      if (b) pitch_ = std::max(pitch_, padded(b - 1));
    }
    rank_.assign(blocks * block_, -1);
    fill(floats_, kVector, blocks);
    fill(halves_, kHalves, blocks);
    for (int64_t i = 0; i < selection_.column_count; ++i) {
      const int64_t column = selection_.columns[i], block = column / block_;
      const int64_t preceding = floats_.preceding[column / kVector];
      rank_[column] = static_cast<int32_t>(i - first_column_[block] - preceding);
    }
  }

  template <class Index>
  void fill(SqueezeTable<Index>& table, int lanes, int64_t blocks) const {
    table.lanes = lanes;
    table.order.assign(blocks * block_, -1);
    int64_t i = 0;
    for (int64_t first = 0; first < blocks * block_; first += lanes) {
      table.preceding.push_back(static_cast<uint8_t>(i - first_column_[first / block_]));
      for (int64_t k = first; i < selection_.column_count && selection_.columns[i] < first + lanes;
           ++i, ++k) {
        table.order[k] = static_cast<Index>(selection_.columns[i] - first);
      }
    }
  }

  // In place each vector is read before anything is written where it was, since it moves to the
  // front.
  template <class Vector, class Order, class Element, class Index>
  void squeeze(const SqueezeTable<Index>& table, int64_t block, const Element* slots,
               int64_t slot_count, Element* out) const {
    constexpr int kLanes = sizeof(Vector) / sizeof(Element);
    const int vectors = block_ / kLanes, kept = count(block), width = padded(block);
    const Index* order = table.order.data() + block * block_;
    const uint8_t* preceding = table.preceding.data() + block * vectors;
    for (int64_t i = 0; i < slot_count; ++i, slots += block_, out += width) {
      for (int v = 0; v < vectors; ++v) {
        Vector values;
        Order sources;
        std::memcpy(&values, slots + v * kLanes, sizeof values);
        std::memcpy(&sources, order + v * kLanes, sizeof sources);
        values = picked(values, sources);
        std::memcpy(out + preceding[v], &values, sizeof values);
      }
      if (kept + kPadTo <= block_) {
        std::memset(out + kept, 0, sizeof(Element) * kPadTo);
      } else {
        for (int e = kept; e < width; ++e) out[e] = 0;
      }
    }
  }

  Floats<kVector> spread_at(int64_t block, const float* values, int e) const {
    const int64_t column = block * block_ + e;
    const Floats<kVector> found = load<kVector>(values + floats_.preceding[column / kVector]);
    return picked(found, load_words<kVector>(rank_.data() + column));
  }

  Selection selection_;
  int block_;
  int pitch_ = 0;
  int64_t column_count_ = 0, most_rows_ = 0;
  std::vector<int32_t> first_row_;     // [octets + 1]
  std::vector<int32_t> number_of_;     // [octets, 8]
  std::vector<int32_t> first_column_;  // [blocks + 1]
  std::vector<int32_t> columns_;       // of units
  std::vector<int32_t> rank_;  // [blocks, block]: of an element among the chosen ones of its vector
  SqueezeTable<int32_t> floats_;
  SqueezeTable<int16_t> halves_;
};

// The chosen elements of those of a window's `slots` that the bank has, `present` of them, as a
// factor of a product: see window_rows and window_pairs.
inline Factor chosen_window(const Ring& ring, const Chosen& chosen, int64_t block, int64_t first,
                            int64_t slots, int64_t present, float* buffer) {
  const float* window = window_rows(ring, first, slots, buffer);
  return {chosen.squeezed(block, window, present, buffer), chosen.padded(block), 1};
}

inline PairFactor chosen_window(const Ring& ring, const Chosen& chosen, int64_t block,
                                int64_t first, int64_t slots, int64_t present, uint32_t* buffer) {
  if (!chosen.has_columns()) {
    return window_pairs(ring, first, slots, chosen.count(block), buffer);
  }
  const PairFactor window = window_pairs(ring, first, slots, ring.block, buffer);
  const uint16_t* halves = chosen.squeezed(block, reinterpret_cast<const uint16_t*>(window.data),
                                           present, reinterpret_cast<uint16_t*>(buffer));
  return {reinterpret_cast<const uint32_t*>(halves), chosen.padded(block) / 2, 1};
}

}  // namespace
}  // namespace rpg
