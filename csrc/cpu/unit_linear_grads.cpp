// unit_linear_grads: dx [batch, K] = scale · dy [batch, N] · (G ring) and
// dw [slots, block] = scale · Gᵀ · (dyᵀ x), for the unit law; either or both. dw is zero before.
//
// The mirror of unit_linear.cpp. A unit, R rows of a column of blocks, reads W slots of a window.
// So for L rows of the batch ("lanes"), with x_b and dx_b [L, block]:
//
//   T [W, L]           = Σ ± dy [row, L] of the rows that read the slot      `laps` of them
//   dx_b [L, block]   += Tᵀ · window [W, block]                              product.h
//   dw [W, block]     += T · x_b
//
// in chunks of kChunk octets of slots, whose T stays in L1. Shuffled octets are dealt to slots in
// order of uses, so nothing is sorted: uses of octet o of the window are laps o - used ... of the
// unit. Memory, for units of 1024 rows on 256 slots of 64, 64 lanes, 4096 rows and columns:
//
//   dy in lanes             [N, L]               1 MB    L3, a group of it in L2; for all threads
//   x in rows               [K / block, L, block] 1 MB   L3; for all threads
//   dx                      [K / block, L, block] 1 MB   for each thread
//   T                       [8 kChunk, L]        32 KB   L1, L2; for each thread, as what follows
//   window                  [8 kChunk, block]    32 KB   copied where it is no fp32 or not whole
//   products for dw         [8 kChunk, block]    32 KB   where they cannot be added in place
//   entries, shuffled, uses [R / 8]              1 KB    L1
//
// Threads share the ring: each owns the slots of a *zone*, as many uses in each, and adds what
// reads them, so no two write the same of dw; slots behind the end of a zone that belong to its
// last octet go to memory of their own, and each thread has its own dx. All is added up in order of
// threads, so results depend on their number, in rounding, and on nothing else.
//
// A slot that no row reads is not multiplied: it may hold an infinity, and x as well. There are
// some where the last octet of rows is not whole.

#include <vector>

#include "cpu/lanes_linear.h"
#include "cpu/product.h"
#include "cpu/unit_window.h"

namespace rpg::RPG_ISA {

namespace {

constexpr int64_t kChunk = 16;
constexpr int64_t kChunkSlots = kChunk * kOctet;

// How the workspace is divided, in bytes: what all threads share, and what each has.
struct GradsLayout {
  int64_t dy, x;
  int64_t dx, t, window, products, spill, entries, shuffled, octet_at;
  int64_t shared() const { return dy + x; }
  int64_t of_thread() const {
    return dx + t + window + products + spill + entries + shuffled + octet_at;
  }
};

GradsLayout layout_of(const LayerLaw& law, const UnitPlan& plan, const LanesLinearGradsArgs& args) {
  GradsLayout out{};
  const int64_t lanes = args.lanes, block = law.granularity, room = entries_room(plan.most_octets);
  out.dy = lines(4 * int64_t{plan.band.octets} * kOctet * lanes);
  out.x = args.dw ? lines(4 * law.blocks * lanes * block) : 0;
  out.dx = args.dx ? lines(4 * law.blocks * lanes * block) : 0;
  out.t = lines(4 * kChunkSlots * lanes);
  out.window = args.dx ? lines(4 * kChunkSlots * block) : 0;
  out.products = args.dw ? lines(4 * kChunkSlots * block) : 0;
  out.spill = args.dw ? lines(4 * kOctet * block) : 0;
  out.entries = lines(room * sizeof(OctetEntry));
  out.shuffled = lines(room * sizeof(uint16_t));
  out.octet_at = lines(room * sizeof(uint16_t));
  return out;
}

// T [slots of an octet, L]: what the octets of rows number at[0 ... count - 1] add to its 8 slots,
// where L is NV vectors.
template <int NV>
void sum_octet(const OctetEntry* entry, const uint16_t* octets, int count, const float* dy,
               const int32_t (*rows)[8], float* t) {
  typedef Floats<kVector> Vector;
  constexpr int64_t kLanes = NV * kVector;
  for (int c = 0; c < 8; ++c, t += kLanes) {
    Vector sum[NV] = {};
    for (int u = 0; u < count; ++u) {
      const OctetEntry e = entry[octets[u]];
      const int row = rows[e.pattern][c];
      const float* line = dy + (kOctet * int64_t{octets[u]} + row) * kLanes;
      const Vector sign = splat<kVector>(kSigns[e.signs >> row & 1]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sum[v] += sign * load<kVector>(line + v * kVector);
    }
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store<kVector>(t + v * kVector, sum[v]);
  }
}

class UnitLinearGrads {
 public:
  UnitLinearGrads(const LayerLaw& law, const LanesLinearGradsArgs& args)
      : law_(law),
        args_(args),
        plan_(law),
        layout_(layout_of(law, plan_, args)),
        ring_{args.bank_dtype, args.ring, int64_t{law.slots}, law.granularity},
        last_rows_(static_cast<int>(law.rows % kOctet)) {
    cut_zones();
  }

  void run() {
    const int64_t lanes = args_.lanes, tiles = (args_.batch + lanes - 1) / lanes;
    const int zones = static_cast<int>(zone_.size()) - 1;
#pragma omp parallel num_threads(zones)
    {
#pragma omp for schedule(static)
      for (int part = 0; part < zones; ++part) {
        if (args_.dw) std::memset(memory_of(part).spill, 0, layout_.spill);
      }
      for (int64_t tile = 0; tile < tiles; ++tile) {
#pragma omp for schedule(static)
        for (int64_t octet = 0; octet < int64_t{plan_.band.octets}; ++octet) pack_dy(tile, octet);
#pragma omp for schedule(static)
        for (int64_t column = 0; column < law_.blocks; ++column) pack_x(tile, column);
#pragma omp for schedule(static)
        for (int part = 0; part < zones; ++part) add_zone(part, lanes_of(tile));
#pragma omp for schedule(static)
        for (int64_t column = 0; column < law_.blocks; ++column) write_dx(tile, column);
      }
#pragma omp for schedule(static)
      for (int part = 0; part < zones; ++part) scale_dw(part);
    }
    if (args_.dw) add_spills();
  }

 private:
  struct GradsMemory {
    float *dx, *t, *window, *products, *spill;
    OctetEntry* entries;
    uint16_t *shuffled, *octet_at;
  };

  float* dy() const { return static_cast<float*>(args_.workspace); }
  float* x() const { return dy() + layout_.dy / 4; }

  GradsMemory memory_of(int part) const {
    Carver carver(args_.workspace, layout_.shared() + part * layout_.of_thread());
    GradsMemory out{};
    carver.take(out.dx, layout_.dx), carver.take(out.t, layout_.t),
        carver.take(out.window, layout_.window);
    carver.take(out.products, layout_.products), carver.take(out.spill, layout_.spill);
    carver.take(out.entries, layout_.entries), carver.take(out.shuffled, layout_.shuffled);
    carver.take(out.octet_at, layout_.octet_at);
    return out;
  }

  // Zones, of slots counted from the first that the layer reads, around the ring: its octets follow
  // each other, so the first `rest` slots are in one octet more than the others.
  void cut_zones() {
    const int64_t slots = law_.slots, laps = law_.laps;
    const int64_t uses = int64_t{plan_.band.octets} * law_.blocks + plan_.band.offset;
    const int64_t read = (uses + laps - 1) / laps * kOctet, rest = read % slots,
                  passes = read / slots;
    slots_read_ = std::min(read, slots);
    zone_.push_back(0);
    for (int part = 1; part < args_.threads; ++part) {
      const int64_t wanted = read * part / args_.threads;
      const int64_t place = wanted < rest * (passes + 1)
                                ? wanted / (passes + 1)
                                : rest + (wanted - rest * (passes + 1)) / passes;
      if (place >= zone_.back() + kOctet && place + kOctet <= slots) zone_.push_back(place);
    }
    zone_.push_back(slots);
  }

  int64_t rows_of(int64_t tile) const {
    return std::min<int64_t>(args_.batch - tile * args_.lanes, args_.lanes);
  }
  // The last tile may have fewer rows than the others, and fewer lanes.
  int lanes_of(int64_t tile) const { return lanes_for(rows_of(tile), args_.lanes); }
  int valid_of(int64_t column) const {
    return static_cast<int>(
        std::min<int64_t>(args_.columns - column * law_.granularity, law_.granularity));
  }

  void pack_dy(int64_t tile, int64_t octet) const {
    const int64_t row = octet * kOctet, columns = std::min<int64_t>(law_.rows - row, kOctet);
    pack_lanes({args_.dtype, args_.dy}, tile * args_.lanes * law_.rows + row, law_.rows,
               rows_of(tile), columns, lanes_of(tile), dy() + row * lanes_of(tile));
  }

  void pack_x(int64_t tile, int64_t column) const {
    if (!args_.dw) return;
    const int64_t block = law_.granularity;
    pack_rows({args_.dtype, args_.x}, tile * args_.lanes * args_.columns + column * block,
              args_.columns, rows_of(tile), args_.columns - column * block, lanes_of(tile),
              law_.granularity, law_.granularity, x() + column * lanes_of(tile) * block);
  }

  // What the slots of a zone add for a tile.
  void add_zone(int part, int64_t lanes) const {
    const GradsMemory memory = memory_of(part);
    const int64_t slots = law_.slots, low = zone_[part], high = zone_[part + 1];
    if (args_.dx) std::memset(memory.dx, 0, layout_.dx);
    for (uint32_t group = 0; group < plan_.band.groups; ++group) {
      const float* rows = dy() + int64_t{first_octet(plan_.band, group)} * kOctet * lanes;
      for (uint32_t column = 0; column < plan_.band.columns; ++column) {
        const PlannedUnit& planned = plan_.unit_of(group, column);
        bool dealt = false;
        // Octets of the window that begin in the zone: some in a row, again after each turn.
        int64_t first = (int64_t{planned.window.base} - plan_.band.base + slots) % slots;
        for (int64_t o = 0; o < planned.window.octets;) {
          const int64_t limit = first < low ? low : first < high ? high : slots;
          const int64_t count =
              std::min<int64_t>((limit - first + kOctet - 1) / kOctet, planned.window.octets - o);
          if (first >= low && first < high) {
            if (!dealt) deal(planned, memory);
            dealt = true;
            for (int64_t done = 0; done < count; done += kChunk) {
              add_chunk(planned, column, rows, o + done, std::min(count - done, kChunk), part,
                        lanes, memory);
            }
          }
          o += count;
          first = (first + count * kOctet) % slots;
        }
      }
    }
  }

  // octet_at[u]: which octet of rows is number u of those that read the window.
  void deal(const PlannedUnit& planned, const GradsMemory& memory) const {
    unit_entries(plan_.band, planned.unit, planned.window, memory.entries, memory.shuffled);
    for (uint32_t i = 0; i < planned.unit.size; ++i) {
      memory.octet_at[memory.shuffled[i]] = static_cast<uint16_t>(i);
    }
  }

  // T of octet o of a window; returns the slots of it that are read, as bits.
  uint32_t sum(const PlannedUnit& planned, const float* rows, int64_t o, int64_t lanes,
               const GradsMemory& memory, float* t) const {
    const int64_t laps = law_.laps, used = planned.window.used;
    const int64_t begin = std::max<int64_t>(o * laps - used, 0);
    const int64_t end = std::min<int64_t>((o + 1) * laps - used, planned.unit.size);
    const uint16_t* octets = memory.octet_at + begin;
    const int count = static_cast<int>(end - begin);
    const int32_t (*table)[8] = rows_of_slots_;
    switch (lanes / kVector) {
      case 1: sum_octet<1>(memory.entries, octets, count, rows, table, t); break;
      case 2: sum_octet<2>(memory.entries, octets, count, rows, table, t); break;
      case 4: sum_octet<4>(memory.entries, octets, count, rows, table, t); break;
      case 8: sum_octet<8>(memory.entries, octets, count, rows, table, t); break;
      default: sum_octet<16>(memory.entries, octets, count, rows, table, t); break;
    }
    if (!last_rows_) return 0xFF;
    // Units have one tap: the last octet of rows is the last of its unit.
    const bool has_last =
        planned.unit.q % plan_.band.octets + planned.unit.size == plan_.band.octets;
    uint32_t read = 0;
    for (int u = 0; u < count; ++u) {
      if (!has_last || octets[u] + 1u < planned.unit.size) return 0xFF;
      for (int r = 0; r < last_rows_; ++r) {
        read |= 1u << residues_[memory.entries[octets[u]].pattern][r];
      }
    }
    return read;
  }

  // Octets o ... o + count - 1 of a window: T, then what it adds to dx and to dw.
  void add_chunk(const PlannedUnit& planned, uint32_t column, const float* rows, int64_t o,
                 int64_t count, int part, int64_t lanes, const GradsMemory& memory) const {
    const int64_t block = law_.granularity, slots = law_.slots;
    uint8_t read[kChunk];
    bool whole = true;
    for (int64_t k = 0; k < count; ++k) {
      read[k] = static_cast<uint8_t>(
          sum(planned, rows, o + k, lanes, memory, memory.t + k * kOctet * lanes));
      whole &= read[k] == 0xFF;
    }
    const auto is_read = [&read](int64_t j) { return read[j / kOctet] >> j % kOctet & 1; };
    const int64_t first = (planned.window.base + o * kOctet) % slots, size = count * kOctet;
    if (args_.dx) {
      const float* window = window_rows(ring_, first, size, memory.window);
      if (!whole) {
        if (window != memory.window) std::memcpy(memory.window, window, 4 * size * block);
        window = memory.window;
        for (int64_t j = 0; j < size; ++j) {
          if (!is_read(j)) std::memset(memory.window + j * block, 0, 4 * block);
        }
      }
      multiply<true>(static_cast<int>(lanes), static_cast<int>(block), {memory.t, 1, lanes}, window,
                     block, static_cast<int>(size), memory.dx + column * lanes * block, block);
    }
    if (!args_.dw) return;
    const float* xb = x() + column * lanes * block;
    const int valid = valid_of(column);
    // The end of the zone, in slots of the ring.
    const int64_t end = (plan_.band.base + zone_[part + 1] - 1) % slots + 1;
    const int64_t inside =
        first < end ? std::min(size, end - first) : std::min(size, slots - first);
    if (whole && inside == size && valid == block) {
      multiply<true>(static_cast<int>(size), static_cast<int>(block), {memory.t, lanes, 1}, xb,
                     block, static_cast<int>(lanes), args_.dw + first * block, block);
      return;
    }
    multiply<false>(static_cast<int>(size), static_cast<int>(block), {memory.t, lanes, 1}, xb,
                    block, static_cast<int>(lanes), memory.products, block);
    for (int64_t j = 0; j < size; ++j) {
      if (!is_read(j)) continue;
      // Slots counted around the ring from the layer's first, as zones are.
      const int64_t place = (first + j - plan_.band.base + 2 * slots) % slots;
      const bool spilt = place < zone_[part] || place >= zone_[part + 1];
      const int64_t number = (place - zone_[part + 1] + slots) % slots;
      float* target =
          spilt ? memory.spill + number * block : args_.dw + (first + j) % slots * block;
      for (int e = 0; e < valid; ++e) target[e] += memory.products[j * block + e];
    }
  }

  void write_dx(int64_t tile, int64_t column) const {
    if (!args_.dx) return;
    const int64_t lanes = lanes_of(tile), block = law_.granularity;
    const float scale = static_cast<float>(args_.scale);
    const int valid = valid_of(column);
    const int64_t size = args_.dtype == Dtype::kFloat32 ? 4 : 2;
    for (int64_t m = 0; m < rows_of(tile); ++m) {
      float out[128];
      for (int e = 0; e < valid; ++e) out[e] = 0;
      for (size_t part = 0; part + 1 < zone_.size(); ++part) {
        const float* dx = memory_of(static_cast<int>(part)).dx + (column * lanes + m) * block;
        for (int e = 0; e < valid; ++e) out[e] += dx[e];
      }
      for (int e = 0; e < valid; ++e) out[e] *= scale;
      void* target = static_cast<char*>(args_.dx) +
                     ((tile * args_.lanes + m) * args_.columns + column * block) * size;
      write_some(args_.dtype, out, valid, target);
    }
  }

  void scale_dw(int part) const {
    if (!args_.dw) return;
    const int64_t block = law_.granularity, slots = law_.slots;
    const float scale = static_cast<float>(args_.scale);
    for (int64_t place = zone_[part]; place < std::min(zone_[part + 1], slots_read_); ++place) {
      float* dw = args_.dw + (plan_.band.base + place) % slots * block;
      for (int64_t e = 0; e < block; ++e) dw[e] *= scale;
    }
  }

  void add_spills() const {
    const int64_t block = law_.granularity, slots = law_.slots;
    const float scale = static_cast<float>(args_.scale);
    for (size_t part = 0; part + 1 < zone_.size(); ++part) {
      const float* spill = memory_of(static_cast<int>(part)).spill;
      for (int64_t j = 0; j < kOctet; ++j) {
        float* dw = args_.dw + (plan_.band.base + zone_[part + 1] + j) % slots * block;
        for (int64_t e = 0; e < block; ++e) dw[e] += scale * spill[j * block + e];
      }
    }
  }

  const LayerLaw& law_;
  const LanesLinearGradsArgs& args_;
  UnitPlan plan_;
  GradsLayout layout_;
  Ring ring_;
  int last_rows_;              // of the last octet, where it is not whole; 0: it is
  std::vector<int64_t> zone_;  // where zones begin
  int64_t slots_read_ = 0;     // of the ring, from the first on
  const int32_t (*residues_)[8] = residues_of(plan_.band);
  const int32_t (*rows_of_slots_)[8] = rpg::rows_of(plan_.band);
};

}  // namespace

Workspace unit_linear_grads_workspace(const LayerLaw& law, const LanesLinearGradsArgs& args) {
  const GradsLayout layout = layout_of(law, UnitPlan(law), args);
  return {layout.shared() + args.threads * layout.of_thread(),
          layout.shared() + args.threads * layout.dx};
}

void unit_linear_grads(const LayerLaw& law, const LanesLinearGradsArgs& args) {
  UnitLinearGrads(law, args).run();
}

}  // namespace rpg::RPG_ISA
