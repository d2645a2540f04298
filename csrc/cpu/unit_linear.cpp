// unit_linear: y [batch, N] = scale · x [batch, K] · (G ring)ᵀ + bias, for the unit law.
//
// A unit, R rows of a column of blocks, reads W slots of a window, `laps` rows each. So for L rows
// of x ("lanes"), with x_b [block, L]:
//
//   S [W, L]    = window [W, block] · x_b             product.h
//   y [R, L]   += ± S [slot(row)]                     a line of L floats for each row and column
//
// Several columns, kTogether, are added at once, so that a row of y stays in registers meanwhile.
// Memory of a thread, for units of 1024 rows on 256 slots of 64, 64 lanes, K = 4096:
//
//   x_b of all columns   [K, L]               1 MB    L3, a panel of 16 KB at a time in L1
//   S                    [kTogether, W, L]    256 KB  L2
//   y of a group         [R, L]               256 KB  L2
//   window               [W, block]           64 KB   copied where it is no fp32, wraps around, or
//                                                     lacks slots
//   entries              [kTogether, R / 8]   2 KB    L1
//
// With pairs (pairs.h) x_b is [block / 2, L] words and the window, where it is copied, [W, block /
// 2]: half of these numbers. S and y are fp32.
//
// Slots that the bank lacks are left out of the window before it is multiplied, so that products
// shrink with the bank; lines of S are then spread to where the entries look for them, with zeros
// between them.
//
// Multiplications: W block L for each unit, 1 / laps of the dense ones. Additions: R L, each with a
// load from L2.
//
// Where there are as many tiles of L rows as threads, a thread does whole tiles, and results do not
// depend on the number of threads. Otherwise threads share the columns of each tile, and add up
// what they have in order.
//
// With a selection (chosen.h) x has chosen columns of a block alone, the window is squeezed to
// them, and y has chosen rows alone: multiplications shrink with the columns, additions with the
// rows.

#include <vector>

#include "cpu/chosen.h"
#include "cpu/lanes_linear.h"
#include "cpu/product.h"
#include "cpu/unit_sums.h"

namespace rpg::RPG_ISA {

namespace {

constexpr int kTogether = 4;

// How the workspace is divided; bytes of one thread.
struct UnitLinearLayout {
  bool by_tiles;
  int64_t x, s, y, window, entries, shuffled;
  int64_t bytes() const { return x + s + y + window + entries + shuffled; }
};

UnitLinearLayout layout_of(const LayerLaw& law, const UnitPlan& plan, const Chosen& chosen,
                           const LanesLinearArgs& args) {
  UnitLinearLayout out{};
  const int64_t lanes = args.lanes, block = law.granularity;
  const int64_t tiles = (args.batch + lanes - 1) / lanes;
  out.by_tiles = tiles >= args.threads;
  const int64_t columns = out.by_tiles ? chosen.columns() : chosen.columns() / args.threads + 1;
  const int64_t rows = octets_for(out.by_tiles ? chosen.most_rows() : chosen.rows()) * kOctet;
  const int64_t size = args.pairs ? 2 : 4;  // bytes of an operand's element
  out.x = lines(size * columns * chosen.pitch() * lanes);
  out.s = lines(4 * kTogether * plan.most_window * kOctet * lanes);
  out.y = lines(4 * rows * lanes);
  out.window = lines(size * plan.most_window * kOctet * block);
  out.entries = lines(kTogether * entries_room(plan.most_octets) * sizeof(OctetEntry));
  out.shuffled = lines(entries_room(plan.most_octets) * sizeof(uint16_t));
  return out;
}

class UnitLinear {
 public:
  UnitLinear(const LayerLaw& law, const LanesLinearArgs& args)
      : args_(args),
        plan_(law),
        chosen_(law, plan_, args.selection, args.columns),
        layout_(layout_of(law, plan_, chosen_, args)),
        ring_{args.bank, int64_t{law.slots}, law.granularity} {}

  void run() {
    const int64_t lanes = args_.lanes, tiles = (args_.batch + lanes - 1) / lanes;
    if (layout_.by_tiles) {
#pragma omp parallel for num_threads(args_.threads) schedule(dynamic)
      for (int64_t tile = 0; tile < tiles; ++tile) whole_tile(thread_number(), tile);
      return;
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
#pragma omp parallel num_threads(args_.threads)
      {
#pragma omp for schedule(static)
        for (int part = 0; part < args_.threads; ++part) columns_of_tile(part, tile);
#pragma omp for schedule(static)
        for (int part = 0; part < args_.threads; ++part) join(part, tile);
      }
    }
  }

 private:
  struct UnitLinearMemory {
    void *x, *window;  // floats, or words of pairs
    float *s, *y;
    OctetEntry* entries;
    uint16_t* shuffled;
  };

  UnitLinearMemory memory_of(int part) const {
    Carver carver(args_.workspace, part * layout_.bytes());
    UnitLinearMemory out{};
    carver.take(out.x, layout_.x), carver.take(out.s, layout_.s), carver.take(out.y, layout_.y);
    carver.take(out.window, layout_.window), carver.take(out.entries, layout_.entries);
    carver.take(out.shuffled, layout_.shuffled);
    return out;
  }

  int64_t rows_of(int64_t tile) const {
    return std::min<int64_t>(args_.batch - tile * args_.lanes, args_.lanes);
  }
  // The last tile may have fewer rows than the others, and fewer lanes.
  int lanes_of(int64_t tile) const { return lanes_for(rows_of(tile), args_.lanes); }

  // x of columns number `low` to `high` - 1 of blocks, in lanes, [columns, pitch, L].
  void pack(const UnitLinearMemory& memory, int64_t tile, int64_t low, int64_t high) const {
    const Activations x{args_.x_dtype, args_.x};
    const int64_t stride = chosen_.elements(), row = tile * args_.lanes * stride;
    for (int64_t i = low; i < high; ++i) {
      const int64_t column = chosen_.column(i), first = row + chosen_.first_element(column);
      const int64_t offset = (i - low) * chosen_.pitch() * lanes_of(tile);
      if (args_.pairs) {
        pack_lane_pairs(x, first, stride, rows_of(tile), chosen_.count(column), lanes_of(tile),
                        static_cast<uint32_t*>(memory.x) + offset / 2);
      } else {
        pack_lanes(x, first, stride, rows_of(tile), chosen_.count(column), lanes_of(tile),
                   static_cast<float*>(memory.x) + offset);
      }
    }
  }

  // The number of a group's first chosen row.
  int64_t first_row(uint32_t group) const {
    return chosen_.first_row(first_octet(plan_.band, group));
  }

  void whole_tile(int part, int64_t tile) const {
    const UnitLinearMemory memory = memory_of(part);
    pack(memory, tile, 0, chosen_.columns());
    for (uint32_t group = 0; group < plan_.band.groups; ++group) {
      const int64_t rows = chosen_.rows_of(plan_, group);
      if (!rows) continue;
      add_group(memory, group, 0, chosen_.columns(), lanes_of(tile), memory.y);
      const float* sums[1] = {memory.y};
      write(sums, 1, first_row(group), rows, tile);
    }
  }

  void columns_of_tile(int part, int64_t tile) const {
    const UnitLinearMemory memory = memory_of(part);
    const int64_t columns = chosen_.columns();
    const int64_t low = columns * part / args_.threads;
    const int64_t high = columns * (part + 1) / args_.threads;
    if (low == high) return;
    pack(memory, tile, low, high);
    for (uint32_t group = 0; group < plan_.band.groups; ++group) {
      if (!chosen_.rows_of(plan_, group)) continue;
      add_group(memory, group, low, high, lanes_of(tile),
                memory.y + first_row(group) * lanes_of(tile));
    }
  }

  // This part's share of the rows, of which every part has summed some columns.
  void join(int part, int64_t tile) const {
    std::vector<const float*> sums;
    const int64_t columns = chosen_.columns(), threads = args_.threads;
    const int64_t octets = octets_for(chosen_.rows());
    const int64_t first = octets * part / threads * kOctet;
    const int64_t end = std::min(octets * (part + 1) / threads * kOctet, chosen_.rows());
    for (int64_t peer = 0; peer < threads; ++peer) {
      if (columns * peer / threads < columns * (peer + 1) / threads) {
        sums.push_back(memory_of(static_cast<int>(peer)).y + first * lanes_of(tile));
      }
    }
    write(sums.data(), static_cast<int>(sums.size()), first, end - first, tile);
  }

  // y [rows of the group, L] = the sum over columns number `low` to `high` - 1, whose x is packed.
  void add_group(const UnitLinearMemory& memory, uint32_t group, int64_t low, int64_t high,
                 int64_t lanes, float* y) const {
    const int64_t room = entries_room(plan_.most_octets);
    const int64_t s_size = plan_.most_window * kOctet * lanes;
    for (int64_t first = low; first < high; first += kTogether) {
      const int count = static_cast<int>(std::min<int64_t>(high - first, kTogether));
      const OctetEntry* entry[kTogether];
      const float* s[kTogether];
      for (int g = 0; g < count; ++g) {
        const uint32_t column = chosen_.column(first + g);
        const PlannedUnit& planned = plan_.unit_of(group, column);
        OctetEntry* entries = memory.entries + g * room;
        unit_entries(plan_.band, planned.unit, planned.window, entries, memory.shuffled);
        const int64_t slots = planned.window.octets * int64_t{kOctet};
        const int rows = static_cast<int>(present_slots(ring_, planned.window.base, slots));
        float* products = memory.s + g * s_size;
        const int count_of = chosen_.count(column);
        const void* next = nullptr;
        if (first + g + 1 < high && !ring_.places) {
          next = ring_.slot(plan_.unit_of(group, chosen_.column(first + g + 1)).window.base);
        }
        const int64_t offset = (first + g - low) * chosen_.pitch() * lanes;
        if (args_.pairs) {
          const PairFactor window =
              chosen_window(ring_, chosen_, column, planned.window.base, slots, rows,
                            static_cast<uint32_t*>(memory.window));
          multiply<false>(rows, static_cast<int>(lanes), window,
                          static_cast<const uint32_t*>(memory.x) + offset / 2, lanes,
                          (count_of + 1) / 2, products, lanes, next);
        } else {
          const Factor window = chosen_window(ring_, chosen_, column, planned.window.base, slots,
                                              rows, static_cast<float*>(memory.window));
          multiply<false>(rows, static_cast<int>(lanes), window,
                          static_cast<const float*>(memory.x) + offset, lanes, count_of, products,
                          lanes, next);
        }
        spread_lines(ring_, planned.window.base, slots, rows, lanes, lanes, products);
        entry[g] = entries, s[g] = products;
      }
      const int32_t (*residues)[8] = residues_of(plan_.band);
      const bool add = first > low;
      const int64_t whole = int64_t{group_size(plan_.band, group)} * kOctet;
      if (chosen_.has_rows()) {
        const int64_t begin = first_row(group), of_group = first_octet(plan_.band, group);
        const auto row_of = [&](int64_t n) { return chosen_.row(begin + n) - of_group * kOctet; };
        add_lines(lanes, entry, s, count, chosen_.rows_of(plan_, group), row_of, residues, add, y);
      } else {
        add_lines(lanes, entry, s, count, whole, EveryRow{}, residues, add, y);
      }
    }
  }

  // Chosen rows of y, the first of them the first of `sums`.
  void write(const float* const* sums, int count, int64_t row, int64_t rows, int64_t tile) const {
    const Stored out{args_.x_dtype, args_.y, chosen_.rows(), static_cast<float>(args_.scale),
                     args_.bias};
    store_lanes(out, sums, count, lanes_of(tile), row, rows, tile * args_.lanes, rows_of(tile));
  }

  const LanesLinearArgs& args_;
  UnitPlan plan_;
  Chosen chosen_;
  UnitLinearLayout layout_;
  Ring ring_;
};

}  // namespace

Workspace unit_linear_workspace(const LayerLaw& law, const LanesLinearArgs& args) {
  const UnitPlan plan(law);
  const Chosen chosen(law, plan, args.selection, args.columns);
  const UnitLinearLayout layout = layout_of(law, plan, chosen, args);
  return {args.threads * layout.bytes() + plan.bytes() + chosen.bytes(), args.threads * layout.x};
}

void unit_linear(const LayerLaw& law, const LanesLinearArgs& args) { UnitLinear(law, args).run(); }

}  // namespace rpg::RPG_ISA
