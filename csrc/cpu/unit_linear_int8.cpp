// unit_linear_int8: y [batch, N] = scale · x [batch, K] · (G ring)ᵀ + bias for the unit law and a
// bank of int8 codes; rows of x are rounded to int8 (int8_rows.h).
//
// As unit_linear, with other products by slot. For L rows of x, with x_b [block, L] in int8:
//
//   S [W, L]    = scale of the slot · (window [W, block] · x_b)   whole numbers, int8_products.h
//   y [R, L]   += ± S [slot(row)]                                 fp32, kTogether columns at once
//   y          := y · step of the row of x · scale + bias
//
// Memory of a thread, for units of 1024 rows on 256 slots of 64, 64 lanes, K = 4096:
//
//   x_b of all columns   [K / 4, L] words     256 KB  L2, a panel of 4 KB at a time in tiles or L1
//   S                    [kTogether, W, L]    256 KB  L2
//   y of a group         [R, L]               256 KB  L2
//   codes                [W, block]           16 KB   copied where they wrap around or have places
//   scales, entries      [W], [R / 8]         5 KB    L1
//
// Plain products take x_b and the codes as fp32, four times these numbers.
//
// Multiplications: W block L for each unit, by tiles 16 x 16 x 64 an instruction of 16 cycles, and
// then W L sums to convert and to scale. Additions: R L, each with a load from L2: they take most
// of the time from a few laps on. Threads share the work as in unit_linear.

#include <optional>
#include <vector>

#include "cpu/int8_products.h"
#include "cpu/int8_rows.h"
#include "cpu/unit_sums.h"

namespace rpg::RPG_ISA {

namespace {

constexpr int kTogether = 4;

// How the workspace is divided; bytes of one thread, and of all.
struct Int8Layout {
  bool by_tiles;
  int64_t steps, inverses;  // of all rows of x
  int64_t x, row, s, y, codes, window, scales, entries, shuffled;
  int64_t shared() const { return steps + inverses; }
  int64_t bytes() const { return x + row + s + y + codes + window + scales + entries + shuffled; }
};

Int8Layout layout_of(const LayerLaw& law, const UnitPlan& plan, const Int8LinearArgs& args) {
  Int8Layout out{};
  const bool plain = args.products == Int8Products::kPlain;
  const int64_t lanes = args.lanes, block = law.granularity;
  const int64_t tiles = (args.batch + lanes - 1) / lanes;
  const int64_t most_rows = padded_rows(plan.most_window * kOctet);
  out.by_tiles = tiles >= args.threads;
  const int64_t columns = out.by_tiles ? plan.band.columns : plan.band.columns / args.threads + 1;
  const int64_t rows = kOctet * (out.by_tiles ? plan.most_octets : int64_t{plan.band.octets});
  out.steps = out.inverses = lines(4 * args.batch);
  out.x = lines((plain ? 4 : 1) * columns * block * lanes);
  out.row = lines(lanes * block);
  out.s = lines(4 * kTogether * most_rows * lanes);
  out.y = lines(4 * rows * lanes);
  out.codes = lines(most_rows * block);
  out.window = plain ? lines(4 * most_rows * block) : 0;
  out.scales = lines(4 * most_rows);
  out.entries = lines(kTogether * entries_room(plan.most_octets) * sizeof(OctetEntry));
  out.shuffled = lines(entries_room(plan.most_octets) * sizeof(uint16_t));
  return out;
}

class UnitLinearInt8 {
 public:
  UnitLinearInt8(const LayerLaw& law, const Int8LinearArgs& args)
      : law_(law),
        args_(args),
        plan_(law),
        layout_(layout_of(law, plan_, args)),
        ring_{args.bank, int64_t{law.slots}, law.granularity} {
    Carver carver(args.workspace, 0);
    carver.take(steps_, layout_.steps), carver.take(inverses_, layout_.inverses);
  }

  void run() const {
    const int64_t lanes = args_.lanes, tiles = (args_.batch + lanes - 1) / lanes;
    const Activations x{args_.x_dtype, args_.x};
#pragma omp parallel for num_threads(args_.threads) schedule(static)
    for (int64_t m = 0; m < args_.batch; ++m) {
      const RowRounding row = rounding_of(x.dtype, x.element(m * args_.columns), args_.columns);
      steps_[m] = row.step, inverses_[m] = row.inverse;
    }
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
  struct Int8Memory {
    void* x;  // words of 4 codes, or floats
    int8_t *row, *codes;
    float *s, *y, *window, *scales;
    OctetEntry* entries;
    uint16_t* shuffled;
  };

  Int8Memory memory_of(int part) const {
    Carver carver(args_.workspace, layout_.shared() + part * layout_.bytes());
    Int8Memory out{};
    carver.take(out.x, layout_.x), carver.take(out.row, layout_.row);
    carver.take(out.s, layout_.s), carver.take(out.y, layout_.y);
    carver.take(out.codes, layout_.codes), carver.take(out.window, layout_.window);
    carver.take(out.scales, layout_.scales), carver.take(out.entries, layout_.entries);
    carver.take(out.shuffled, layout_.shuffled);
    return out;
  }

  int64_t rows_of(int64_t tile) const {
    return std::min<int64_t>(args_.batch - tile * args_.lanes, args_.lanes);
  }
  // The last tile may have fewer rows than the others, and fewer lanes.
  int lanes_of(int64_t tile) const { return lanes_for(rows_of(tile), args_.lanes); }
  bool plain() const { return args_.products == Int8Products::kPlain; }

  // x of columns `low` to `high` - 1 of blocks in lanes, block by block: words [block / 4, L], or
  // floats [block, L].
  void pack(const Int8Memory& memory, int64_t tile, int64_t low, int64_t high) const {
    const int64_t block = law_.granularity, lanes = lanes_of(tile), rows = rows_of(tile);
    const Activations x{args_.x_dtype, args_.x};
    char* out = static_cast<char*>(memory.x);
    for (int64_t column = low; column < high; ++column) {
      const int64_t valid = std::min(args_.columns - column * block, block);
      for (int64_t m = 0; m < lanes; ++m) {
        const int64_t row = tile * args_.lanes + m;
        const bool is_row = m < rows;
        round_row(x.dtype, x.element(row * args_.columns + column * block), is_row ? valid : 0,
                  {0, is_row ? inverses_[row] : 0}, block, memory.row + m * block);
      }
      if (plain()) {
        turn_codes(memory.row, block, lanes, reinterpret_cast<float*>(out));
      } else {
        turn_words(memory.row, block, lanes, reinterpret_cast<uint32_t*>(out));
      }
      out += (plain() ? 4 : 1) * block * lanes;
    }
  }

  void whole_tile(int part, int64_t tile) const {
    const Int8Memory memory = memory_of(part);
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
    const Int8Memory memory = memory_of(part);
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
  void add_group(const Int8Memory& memory, uint32_t group, int64_t low, int64_t high, int64_t lanes,
                 float* y) const {
#if defined(RPG_INT8_TILES)
    std::optional<ShapedTiles> tiles;
    if (args_.products == Int8Products::kTiles) {
      tiles.emplace(std::min(law_.granularity, kTileBytes), static_cast<int>(lanes));
    }
#endif
    const int64_t room = entries_room(plan_.most_octets);
    const int64_t s_size = padded_rows(plan_.most_window * kOctet) * lanes;
    for (int64_t first = low; first < high; first += kTogether) {
      const int count = static_cast<int>(std::min<int64_t>(high - first, kTogether));
      const OctetEntry* entry[kTogether];
      const float* s[kTogether];
      for (int g = 0; g < count; ++g) {
        const int64_t column = first + g;
        const PlannedUnit& planned = plan_.unit_of(group, static_cast<uint32_t>(column));
        OctetEntry* entries = memory.entries + g * room;
        unit_entries(plan_.band, planned.unit, planned.window, entries, memory.shuffled);
        float* products = memory.s + g * s_size;
        const UnitWindow* next =
            column + 1 < high ? &plan_.unit_of(group, column + 1).window : nullptr;
        multiply_window(memory, planned.window, column - low, lanes, products, next);
        entry[g] = entries, s[g] = products;
      }
      add_lines(lanes, entry, s, count, int64_t{group_size(plan_.band, group)} * kOctet, EveryRow{},
                residues_of(plan_.band), first > low, y);
    }
  }

  // s [slots of the window, L] of a packed column; `next` is the window that is read after it.
  void multiply_window(const Int8Memory& memory, const UnitWindow& window, int64_t packed,
                       int64_t lanes, float* s, [[maybe_unused]] const UnitWindow* next) const {
    const int64_t block = law_.granularity, rows = int64_t{window.octets} * kOctet;
    const auto [codes, scales] =
        window_codes(ring_, window.base, rows, memory.codes, memory.scales);
    if (plain()) {
      for (int64_t i = 0; i < rows * block; ++i) memory.window[i] = codes[i];
      const float* x = static_cast<const float*>(memory.x) + packed * block * lanes;
      multiply<false>(static_cast<int>(rows), static_cast<int>(lanes), {memory.window, block, 1}, x,
                      lanes, static_cast<int>(block), s, lanes);
      scale_rows(rows, lanes, scales, s);
      return;
    }
    [[maybe_unused]] const uint32_t* x =
        static_cast<const uint32_t*>(memory.x) + packed * block / 4 * lanes;
#if defined(RPG_INT8_TILES)
    if (args_.products == Int8Products::kTiles) {
      const void* soon = next && !ring_.bank.places ? ring_.codes(next->base) : nullptr;
      multiply_by_tiles(codes, padded_rows(rows), block, x, lanes, scales, s, soon);
      return;
    }
#endif
#if defined(RPG_DOT_PRODUCTS)
    multiply_dots(codes, rows, block, x, lanes, scales, s);
#endif
  }

  // Rows of y, the first of them the first of `sums`.
  void write(const float* const* sums, int count, int64_t row, int64_t rows, int64_t tile) const {
    const Stored out{args_.x_dtype, args_.y, law_.rows, static_cast<float>(args_.scale),
                     args_.bias,    steps_};
    store_lanes(out, sums, count, lanes_of(tile), row, std::min(law_.rows - row, rows),
                tile * args_.lanes, rows_of(tile));
  }

  const LayerLaw& law_;
  const Int8LinearArgs& args_;
  UnitPlan plan_;
  Int8Layout layout_;
  CodeRing ring_;
  float *steps_, *inverses_;  // of rows of x
};

}  // namespace

Workspace unit_linear_int8_workspace(const LayerLaw& law, const Int8LinearArgs& args) {
  const UnitPlan plan(law);
  const Int8Layout layout = layout_of(law, plan, args);
  return {layout.shared() + args.threads * layout.bytes() + plan.bytes(),
          layout.shared() + args.threads * (layout.x + layout.row)};
}

void unit_linear_int8(const LayerLaw& law, const Int8LinearArgs& args) {
  UnitLinearInt8(law, args).run();
}

}  // namespace rpg::RPG_ISA
