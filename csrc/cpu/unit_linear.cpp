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
// Slots that the bank does not have are left out of the window, and their lines of S are zeros.
//
// Multiplications: W block L for each unit, 1 / laps of the dense ones. Additions: R L, each with a
// load from L2.
//
// Where there are as many tiles of L rows as threads, a thread does whole tiles, and results do not
// depend on the number of threads. Otherwise threads share the columns of each tile, and add up
// what they have in order.

#include <vector>

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

UnitLinearLayout layout_of(const LayerLaw& law, const UnitPlan& plan, const LanesLinearArgs& args) {
  UnitLinearLayout out{};
  const int64_t lanes = args.lanes, block = law.granularity;
  const int64_t tiles = (args.batch + lanes - 1) / lanes;
  out.by_tiles = tiles >= args.threads;
  const int64_t columns = out.by_tiles ? plan.band.columns : plan.band.columns / args.threads + 1;
  const int64_t rows = kOctet * (out.by_tiles ? plan.most_octets : int64_t{plan.band.octets});
  const int64_t size = args.pairs ? 2 : 4;  // bytes of an operand's element
  out.x = lines(size * columns * block * lanes);
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
      : law_(law),
        args_(args),
        plan_(law),
        layout_(layout_of(law, plan_, args)),
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

  // x of columns `low` to `high` - 1 of blocks, in lanes.
  void pack(const UnitLinearMemory& memory, int64_t tile, int64_t low, int64_t high) const {
    const int64_t first = low * law_.granularity;
    const int64_t columns = std::min(args_.columns, high * law_.granularity) - first;
    const Activations x{args_.x_dtype, args_.x};
    const int64_t element = tile * args_.lanes * args_.columns + first;
    if (args_.pairs) {
      pack_lane_pairs(x, element, args_.columns, rows_of(tile), columns, lanes_of(tile),
                      static_cast<uint32_t*>(memory.x));
      return;
    }
    pack_lanes(x, element, args_.columns, rows_of(tile), columns, lanes_of(tile),
               static_cast<float*>(memory.x));
  }

  void whole_tile(int part, int64_t tile) const {
    const UnitLinearMemory memory = memory_of(part);
    pack(memory, tile, 0, plan_.band.columns);
    for (uint32_t group = 0; group < plan_.band.groups; ++group) {
      add_group(memory, group, 0, plan_.band.columns, lanes_of(tile), memory.y);
      const int64_t row = int64_t{first_octet(plan_.band, group)} * kOctet;
      const int64_t rows = int64_t{group_size(plan_.band, group)} * kOctet;
      const float* sums[1] = {memory.y};
      write(sums, 1, row, rows, tile);
    }
  }

  void columns_of_tile(int part, int64_t tile) const {
    const UnitLinearMemory memory = memory_of(part);
    const int64_t columns = plan_.band.columns;
    const int64_t low = columns * part / args_.threads;
    const int64_t high = columns * (part + 1) / args_.threads;
    if (low == high) return;
    pack(memory, tile, low, high);
    for (uint32_t group = 0; group < plan_.band.groups; ++group) {
      add_group(memory, group, low, high, lanes_of(tile),
                memory.y + int64_t{first_octet(plan_.band, group)} * kOctet * lanes_of(tile));
    }
  }

  // This part's share of the rows, of which every part has summed some columns.
  void join(int part, int64_t tile) const {
    std::vector<const float*> sums;
    const int64_t columns = plan_.band.columns, threads = args_.threads;
    const int64_t octets = plan_.band.octets;
    const int64_t first = octets * part / threads, end = octets * (part + 1) / threads;
    for (int64_t peer = 0; peer < threads; ++peer) {
      if (columns * peer / threads < columns * (peer + 1) / threads) {
        sums.push_back(memory_of(static_cast<int>(peer)).y + first * kOctet * lanes_of(tile));
      }
    }
    write(sums.data(), static_cast<int>(sums.size()), first * kOctet, (end - first) * kOctet, tile);
  }

  // y [rows of the group, L] = the sum over columns `low` to `high` - 1, whose x is packed.
  void add_group(const UnitLinearMemory& memory, uint32_t group, int64_t low, int64_t high,
                 int64_t lanes, float* y) const {
    const int64_t block = law_.granularity;
    const int64_t room = entries_room(plan_.most_octets);
    const int64_t s_size = plan_.most_window * kOctet * lanes;
    for (int64_t first = low; first < high; first += kTogether) {
      const int count = static_cast<int>(std::min<int64_t>(high - first, kTogether));
      const OctetEntry* entry[kTogether];
      const float* s[kTogether];
      for (int g = 0; g < count; ++g) {
        const int64_t column = first + g;
        const PlannedUnit& planned = plan_.unit_of(group, static_cast<uint32_t>(column));
        OctetEntry* entries = memory.entries + g * room;
        unit_entries(plan_.band, planned.unit, planned.window, entries, memory.shuffled);
        const int64_t slots = planned.window.octets * int64_t{kOctet};
        const int rows = static_cast<int>(present_slots(ring_, planned.window.base, slots));
        float* products = memory.s + g * s_size;
        const int valid = static_cast<int>(std::min(args_.columns - column * block, block));
        const bool has_next = column + 1 < high && !ring_.places;
        const void* next =
            has_next ? ring_.slot(plan_.unit_of(group, column + 1).window.base) : nullptr;
        const int64_t place = (column - low) * block * lanes;
        if (args_.pairs) {
          const PairFactor window = window_pairs(ring_, planned.window.base, slots, valid,
                                                 static_cast<uint32_t*>(memory.window));
          multiply<false>(rows, static_cast<int>(lanes), window,
                          static_cast<const uint32_t*>(memory.x) + place / 2, lanes,
                          (valid + 1) / 2, products, lanes, next);
        } else {
          const float* window =
              window_rows(ring_, planned.window.base, slots, static_cast<float*>(memory.window));
          multiply<false>(rows, static_cast<int>(lanes), {window, block, 1},
                          static_cast<const float*>(memory.x) + place, lanes, valid, products,
                          lanes, next);
        }
        spread_lines(ring_, planned.window.base, slots, rows, lanes, lanes, products);
        entry[g] = entries, s[g] = products;
      }
      const int64_t octets = group_size(plan_.band, group);
      const int32_t (*residues)[8] = residues_of(plan_.band);
      const bool add = first > low;
      add_lines(lanes, entry, s, count, octets, residues, add, y);
    }
  }

  // Rows of y, the first of them the first of `sums`.
  void write(const float* const* sums, int count, int64_t row, int64_t rows, int64_t tile) const {
    const Stored out{args_.x_dtype, args_.y, law_.rows, static_cast<float>(args_.scale),
                     args_.bias};
    store_lanes(out, sums, count, lanes_of(tile), row, std::min(law_.rows - row, rows),
                tile * args_.lanes, rows_of(tile));
  }

  const LayerLaw& law_;
  const LanesLinearArgs& args_;
  UnitPlan plan_;
  UnitLinearLayout layout_;
  Ring ring_;
};

}  // namespace

Workspace unit_linear_workspace(const LayerLaw& law, const LanesLinearArgs& args) {
  const UnitPlan plan(law);
  const UnitLinearLayout layout = layout_of(law, plan, args);
  return {args.threads * layout.bytes() + plan.bytes(), args.threads * layout.x};
}

void unit_linear(const LayerLaw& law, const LanesLinearArgs& args) { UnitLinear(law, args).run(); }

}  // namespace rpg::RPG_ISA
