// Both gradients of a layer of the unit law, whatever it is applied to: what linear layers and
// convolutions have in common.
//
// A unit, R rows at some taps of a block of channels, reads W slots of a window, `laps` times each.
// For P lanes (rows of the batch, or pixels), with x_c and dx_c [P, block]:
//
//   T [W, P]         = Σ ± dy [row, lanes shifted by the tap]   of what reads the slot, dy scaled
//   dx_c [P, block] += Tᵀ · window [W, block]                   product.h
//   dw [W, block]   += T · x_c
//
// in chunks of octets of slots, whose T stays in a near cache. Shuffled octets are dealt to slots
// in order of uses, so nothing is sorted: uses of octet o of the window are laps o - used ... of
// the unit. Threads own zones of the ring (unit_zones.h), and each has its own dx. All is added up
// in order of threads, so for the same number of threads and size of steps results are the same
// bits.
//
// A slot that no row reads is not multiplied: it may hold an infinity, and x as well. There are
// some where the last octet of rows is not whole, and where rows are chosen.
//
// Nor is a lane that none of a slot's taps reaches, at the border of an image: T is zero there, but
// what it meets may be infinite. Where something is not finite, such products are left out one by
// one (`add_reached`), from the first tile on that has an infinity or NaN in dy or x.
//
// With a selection (chosen.h) x and dx have chosen columns of a block alone, the window is squeezed
// to them and what dw gets is spread again; T adds chosen rows alone.
//
// With pairs (pairs.h) T is rounded to bfloat16 before it is multiplied, in words of two slots for
// dx and of two lanes for dw; x and the window are joined to words as well. Products that are left
// out one by one are of fp32.
//
// A Source says what lanes are: where dy, x and dx of a tile lie, and how lines of dy are added. It
// multiplies dy, or with pairs dx, with the layer's scale.

#pragma once

#include <vector>

#include "cpu/unit_grads_memory.h"
#include "cpu/unit_zones.h"

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

constexpr uint32_t kInfinite = 0x7F800000u;          // bits of infinity
constexpr uint32_t kRoundsToInfinite = 0x7F7F8000u;  // of the least number that bfloat16 lacks

// Whether all magnitudes are less than the number that has the bits `limit`.
inline bool all_below(uint32_t limit, const float* values, int64_t count) {
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = as_bits(values[i]) & 0x7FFFFFFFu;
    largest = largest < magnitude ? magnitude : largest;
  }
  return largest < limit;
}

inline void multiply_all(float factor, int64_t count, float* values) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) values[i] *= factor;
}

template <class Source>
class UnitGrads {
 public:
  UnitGrads(const LayerLaw& law, const UnitPlan& plan, const Chosen& chosen,
            const UnitGradsArgs& args, const Source& source)
      : law_(law),
        args_(args),
        plan_(plan),
        chosen_(chosen),
        source_(source),
        size_(source.layout()),
        layout_(unit_grads_layout(law, plan, chosen, args, size_)),
        zones_(law, plan, args.threads),
        ring_{args.bank, int64_t{law.slots}, law.granularity},
        last_rows_(chosen.has_rows() ? 0 : static_cast<int>(law.rows % kOctet)) {}

  void run() {
    const int zones = zones_.count();
#pragma omp parallel num_threads(zones)
    {
#pragma omp for schedule(static)
      for (int part = 0; part < zones; ++part) {
        if (args_.dw) std::memset(memory_of(part).spill, 0, layout_.spill);
      }
      for (int64_t tile = 0; tile < source_.tiles(); ++tile) {
#pragma omp for schedule(static)
        for (int64_t octet = 0; octet < octets_for(chosen_.rows()); octet += kPackedOctets) {
          source_.pack_dy(tile, octet, dy());
        }
#pragma omp for schedule(static)
        for (int64_t block = 0; block < int64_t{law_.run_blocks}; ++block) {
          if (args_.dw && chosen_.count(block)) pack_x(tile, block);
        }
#pragma omp for schedule(static)
        for (int part = 0; part < zones; ++part) add_zone(part, tile);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < int64_t{law_.run_blocks}; ++block) {
          if (args_.dx && chosen_.count(block)) write_dx(tile, block);
        }
      }
    }
    for (int part = 0; args_.dw && part < zones; ++part) {
      zones_.add_spill(part, memory_of(part).spill, args_.dw, law_.granularity);
    }
  }

 private:
  float* dy() const { return static_cast<float*>(args_.workspace); }
  float* x() const { return dy() + layout_.dy / 4; }
  // Words of two lanes of a block of x.
  uint32_t* x_words(int64_t block) const {
    return reinterpret_cast<uint32_t*>(x() + layout_.x / 4) + block * words_of_block();
  }
  int64_t words_of_block() const { return layout_.x_words / law_.run_blocks / 4; }

  UnitGradsMemory memory_of(int part) const {
    Carver carver(args_.workspace, layout_.shared() + part * layout_.of_thread());
    UnitGradsMemory out{};
    carver.take(out.dx, layout_.dx);
    carver.take(out.own, layout_.own);
    carver.take(out.t, layout_.t);
    carver.take(out.window, layout_.window);
    carver.take(out.products, layout_.products);
    carver.take(out.spill, layout_.spill);
    carver.take(out.entries, layout_.entries);
    carver.take(out.shuffled, layout_.shuffled);
    carver.take(out.octet_at, layout_.octet_at);
    carver.take(out.t_words, layout_.t_words);
    carver.take(out.t_halves, layout_.t_halves);
    carver.take(out.own_words, layout_.own_words);
    return out;
  }

  void pack_x(int64_t tile, int64_t block) const {
    source_.pack_x(tile, block, x());
    if (!args_.pairs || size_.gathers) return;
    join_x(tile, block, source_.x_of(tile, block, x(), nullptr), x_words(block));
  }

  // Words of two lanes of a block of x.
  void join_x(int64_t tile, int64_t block, const float* x, uint32_t* words) const {
    join_rows(x, chosen_.pitch(), source_.lanes(tile), chosen_.padded(block), words);
  }

  // What the slots of a zone add for a tile.
  void add_zone(int part, int64_t tile) const {
    const UnitGradsMemory memory = memory_of(part);
    if (args_.dx) std::memset(memory.dx, 0, layout_.dx);
    for (uint32_t group = 0; group < plan_.band.groups; ++group) {
      if (!chosen_.rows_of(plan_, group)) continue;
      for (int64_t i = 0; i < chosen_.columns(); ++i) {
        const uint32_t column = chosen_.column(i);
        const PlannedUnit& planned = plan_.unit_of(group, column);
        const float* xc = nullptr;
        const uint32_t* words = x_words(column % law_.run_blocks);
        bool dealt = false;
        zones_.for_octets(part, planned.window, [&](int64_t o, int64_t count) {
          if (!dealt) deal_octets(planned, memory);
          if (!dealt && args_.dw) {
            xc = source_.x_of(tile, column, x(), memory.own);
            if (args_.pairs && size_.gathers) {
              join_x(tile, column % law_.run_blocks, xc, memory.own_words);
              words = memory.own_words;
            }
          }
          dealt = true;
          for (int64_t done = 0; done < count; done += size_.chunk) {
            add_chunk(planned, group, column, o + done, std::min(count - done, size_.chunk), part,
                      tile, xc, words, memory);
          }
        });
      }
    }
  }

  // octet_at[u]: which octet of rows is number u of those that read the window.
  void deal_octets(const PlannedUnit& planned, const UnitGradsMemory& memory) const {
    unit_entries(plan_.band, planned.unit, planned.window, memory.entries, memory.shuffled);
    for (uint32_t i = 0; i < planned.unit.size; ++i) {
      memory.octet_at[memory.shuffled[i]] = static_cast<uint16_t>(i);
    }
  }

  // T of octet o of a window; returns the slots of it that are read, as bits.
  uint32_t sum(const PlannedUnit& planned, uint32_t group, uint32_t column, int64_t o, int64_t tile,
               const UnitGradsMemory& memory, float* t) const {
    const int64_t laps = law_.laps, used = planned.window.used;
    const int64_t begin = std::max<int64_t>(o * laps - used, 0);
    const int64_t end = std::min<int64_t>((o + 1) * laps - used, planned.unit.size);
    const uint16_t* octets = memory.octet_at + begin;
    const int count = static_cast<int>(end - begin);
    const uint32_t of_chosen = source_.sum_octet(tile, column, first_octet(plan_.band, group),
                                                 group_size(plan_.band, group), memory.entries,
                                                 octets, count, rows_of_slots_, dy(), t);
    if (chosen_.has_rows()) return of_chosen;
    if (!last_rows_ || group + 1 < plan_.band.groups) return 0xFF;
    const uint32_t rows = group_size(plan_.band, group);
    uint32_t read = 0;
    for (int u = 0; u < count; ++u) {
      if (octets[u] % rows + 1u < rows) return 0xFF;
      for (int r = 0; r < last_rows_; ++r) {
        read |= 1u << residues_[memory.entries[octets[u]].pattern][r];
      }
    }
    return read;
  }

  // Octets o ... o + count - 1 of a window: T, then what it adds to dx and to dw.
  void add_chunk(const PlannedUnit& planned, uint32_t group, uint32_t column, int64_t o,
                 int64_t count, int part, int64_t tile, const float* xc, const uint32_t* x_words,
                 const UnitGradsMemory& memory) const {
    const int64_t block = law_.granularity, slots = law_.slots, plane = size_.t_plane;
    const int64_t first = (planned.window.base + o * kOctet) % slots, size = count * kOctet;
    if (ring_.places) return add_present(planned, group, column, o, count, part, tile, xc, memory);
    const float* window = args_.dx ? window_rows(ring_, first, size, memory.window) : nullptr;
    const uint32_t limit = args_.pairs ? kRoundsToInfinite : kInfinite;
    const bool careful = Source::kReaches && (source_.is_careful() ||
                                              (window && !all_below(limit, window, size * block)));
    const bool pairs = args_.pairs && !careful;
    const int64_t channels = column % law_.run_blocks;
    const int padded = chosen_.padded(channels);
    if (window) window = chosen_.squeezed(channels, window, size, memory.window);
    uint8_t read[kMostChunk];
    bool whole = true;
    for (int64_t k = 0; k < count; ++k) {
      float* t = memory.t + (pairs ? 0 : k * kOctet * plane);
      read[k] = static_cast<uint8_t>(sum(planned, group, column, o + k, tile, memory, t));
      // Sources that reach lanes one by one, where anything is not finite, meet zeros elsewhere.
      whole &= read[k] == 0xFF || Source::kReaches;
      if (pairs) round_slots(tile, k * kOctet, kOctet, t, memory);
    }
    if (careful) {
      for (int64_t k = 0; k < count; ++k) {
        add_reached(planned, group, column, o + k, part, tile, xc, memory,
                    memory.t + k * kOctet * plane);
      }
      return;
    }
    const auto is_read = [&](int64_t j) { return whole || read[j / kOctet] >> j % kOctet & 1; };
    if (args_.dx && !whole) {
      if (window != memory.window) {
        for (int64_t j = 0; j < size; ++j) {
          std::memcpy(memory.window + j * padded, window + j * padded, sizeof(float) * padded);
        }
      }
      window = memory.window;
      for (int64_t j = 0; j < size; ++j) {
        if (!is_read(j)) std::memset(memory.window + j * padded, 0, sizeof(float) * padded);
      }
    }
    if (args_.dx) multiply_dx(tile, column, size, window, memory);
    if (!args_.dw) return;
    const int valid = chosen_.count(channels);
    const bool inside = zones_.inside(part, first, size) == size;
    if (!args_.pairs && whole && inside && valid == block) {
      multiply_dw<true>(tile, size, padded, xc, x_words, memory, args_.dw + first * block);
      return;
    }
    multiply_dw<false>(tile, size, padded, xc, x_words, memory, memory.products);
    for (int64_t j = 0; j < size; ++j) {
      if (!is_read(j)) continue;
      float* target = args_.dw + (first + j) * block;
      if (!inside) {
        target = zones_.target(part, (first + j) % slots, args_.dw, memory.spill, block);
      }
      const float* products = memory.products + j * padded;
      if (chosen_.has_columns()) {
        chosen_.add_spread(channels, args_.scale_of_sums, products, target);
        continue;
      }
      for (int e = 0; e < valid; ++e) target[e] += args_.scale_of_sums * products[e];
    }
  }

  // What octets o ... o + count - 1 of a window add to dx, of a bank that lacks slots: only those
  // that it has, and that are read, are multiplied. Their lines of T and rows of the window close
  // ranks, and with pairs a line of zeros makes their number even.
  void add_present(const PlannedUnit& planned, uint32_t group, uint32_t column, int64_t o,
                   int64_t count, int part, int64_t tile, const float* xc,
                   const UnitGradsMemory& memory) const {
    const int64_t block = law_.granularity, plane = size_.t_plane;
    const int64_t first = (planned.window.base + o * kOctet) % law_.slots, size = count * kOctet;
    float* window = memory.window;
    window_rows(ring_, first, size, window);
    const int64_t present = present_slots(ring_, first, size);
    const uint32_t limit = args_.pairs ? kRoundsToInfinite : kInfinite;
    if (Source::kReaches && (source_.is_careful() || !all_below(limit, window, present * block))) {
      for (int64_t k = 0; k < count; ++k) {
        sum(planned, group, column, o + k, tile, memory, memory.t);
        add_reached(planned, group, column, o + k, part, tile, xc, memory, memory.t);
      }
      return;
    }
    const int64_t channels = column % law_.run_blocks, padded = chosen_.padded(channels);
    chosen_.squeezed(channels, window, present, window);
    int64_t lines = 0, row = 0;
    for (int64_t k = 0; k < count && row < present; ++k) {
      float* t = memory.t + lines * plane;
      const uint32_t read = sum(planned, group, column, o + k, tile, memory, t);
      for (int64_t c = 0; c < int64_t{kOctet}; ++c, t += plane) {
        if (!ring_.has((first + k * kOctet + c) % law_.slots)) continue;
        const float* source = window + row++ * padded;
        if (!(read >> c & 1)) continue;
        float *line = memory.t + lines * plane, *target = window + lines * padded;
        if (line != t) std::memcpy(line, t, sizeof(float) * plane);
        if (target != source) std::memcpy(target, source, sizeof(float) * padded);
        ++lines;
      }
    }
    if (args_.pairs) {
      if (lines % 2) {
        std::memset(memory.t + lines * plane, 0, sizeof(float) * plane);
        std::memset(window + lines * padded, 0, sizeof(float) * padded);
        ++lines;
      }
      round_slots(tile, 0, lines, memory.t, memory);
    }
    if (lines) multiply_dx(tile, column, lines, window, memory);
  }

  // Lines `first` ... `first` + count - 1 of T in bfloat16: words of two slots for dx, halves for
  // dw.
  void round_slots(int64_t tile, int64_t first, int64_t count, const float* t,
                   const UnitGradsMemory& memory) const {
    const int64_t plane = size_.t_plane, lanes = source_.lanes(tile);
    for (int64_t slot = first; slot < first + count; slot += 2, t += 2 * plane) {
      uint32_t* words = args_.dx ? memory.t_words + slot / 2 * plane : nullptr;
      uint16_t* halves = args_.dw ? memory.t_halves + slot * plane : nullptr;
      if (has_dot_products()) {
        round_lines<kVector, kDotProducts>(t, t + plane, lanes, words, halves, halves + plane);
      } else {
        round_lines<kVector, false>(t, t + plane, lanes, words, halves, halves + plane);
      }
      if (halves && lanes % 2) halves[lanes] = halves[plane + lanes] = 0;
    }
  }

  // dx_c [lanes, padded] += Tᵀ · window [slots, padded]. With pairs, whose words take the window's
  // memory.
  void multiply_dx(int64_t tile, int64_t column, int64_t slots, const float* window,
                   const UnitGradsMemory& memory) const {
    const int64_t plane = size_.t_plane, padded = chosen_.padded(column % law_.run_blocks);
    if (!args_.pairs) {
      source_.add_dx(tile, column, Factor{memory.t, 1, plane}, window, static_cast<int>(slots),
                     memory.dx, memory.own);
      return;
    }
    uint32_t* words = reinterpret_cast<uint32_t*>(memory.window);
    join_rows(window, padded, slots, padded, words);
    source_.add_dx(tile, column, PairFactor{memory.t_words, 1, plane}, words,
                   static_cast<int>(slots / 2), memory.dx, memory.own);
  }

  // products [slots, padded] (+)= T [slots, lanes] · x_c [lanes, padded], of which there are words.
  template <bool ADD>
  void multiply_dw(int64_t tile, int64_t slots, int padded, const float* xc,
                   const uint32_t* x_words, const UnitGradsMemory& memory, float* products) const {
    const int64_t plane = size_.t_plane;
    const int rows = static_cast<int>(slots);
    const int lanes = static_cast<int>(source_.lanes(tile));
    if (!args_.pairs) {
      multiply<ADD>(rows, padded, Factor{memory.t, plane, 1}, xc, chosen_.pitch(), lanes, products,
                    padded);
      return;
    }
    const uint32_t* t = reinterpret_cast<const uint32_t*>(memory.t_halves);
    multiply<ADD>(rows, padded, PairFactor{t, plane / 2, 1}, x_words, padded, (lanes + 1) / 2,
                  products, padded);
  }

  // What octet o of a window adds: of a slot those lanes that its taps reach, and no product else.
  void add_reached(const PlannedUnit& planned, uint32_t group, uint32_t column, int64_t o, int part,
                   int64_t tile, const float* xc, const UnitGradsMemory& memory,
                   const float* t) const {
    const int64_t laps = law_.laps, used = planned.window.used, block = law_.granularity;
    const int64_t begin = std::max<int64_t>(o * laps - used, 0);
    const int64_t end = std::min<int64_t>((o + 1) * laps - used, planned.unit.size);
    const uint32_t octets = group_size(plan_.band, group), first = first_octet(plan_.band, group);
    const int64_t lanes = source_.lanes(tile);
    const int64_t channels = column % law_.run_blocks, pitch = chosen_.pitch();
    const int valid = chosen_.count(channels);
    std::vector<uint8_t> reached(lanes);
    for (int c = 0; c < 8; ++c, t += size_.t_plane) {
      const int64_t slot = (planned.window.base + o * kOctet + c) % law_.slots;
      if (!ring_.has(slot)) continue;
      std::fill(reached.begin(), reached.end(), uint8_t{0});
      for (int64_t u = begin; u < end; ++u) {
        const uint32_t octet = memory.octet_at[u];
        const int row = rows_of_slots_[memory.entries[octet].pattern][c];
        if (!is_chosen((first + octet % octets) * int64_t{kOctet} + row)) continue;
        source_.reach(tile, column, octet / octets, reached.data());
      }
      float* dw = args_.dw ? zones_.target(part, slot, args_.dw, memory.spill, block) : nullptr;
      const float* window = args_.dx ? window_rows(ring_, slot, 1, memory.window) : nullptr;
      for (int64_t q = 0; q < lanes; ++q) {
        if (!reached[q]) continue;
        float* dx = args_.dx ? source_.dx_row(column, q, memory.dx) : nullptr;
        for (int i = 0; i < valid; ++i) {
          const int e = chosen_.element(channels, i);
          if (dx) dx[i] += t[q] * window[e];
          if (dw) dw[e] += args_.scale_of_sums * t[q] * xc[q * pitch + i];
        }
      }
    }
  }

  bool is_chosen(int64_t row) const {
    return chosen_.has_rows() ? chosen_.number_of()[row] >= 0 : row < law_.rows;
  }

  void write_dx(int64_t tile, int64_t block) const {
    std::vector<float*> parts;
    for (int part = 0; part < zones_.count(); ++part) parts.push_back(memory_of(part).dx);
    source_.write_dx(tile, block, parts);
  }

  const LayerLaw& law_;
  const UnitGradsArgs& args_;
  const UnitPlan& plan_;
  const Chosen& chosen_;
  const Source& source_;
  SourceLayout size_;
  UnitGradsLayout layout_;
  UnitZones zones_;
  Ring ring_;
  int last_rows_;  // of the last octet, where it is not whole; 0: it is
  const int32_t (*residues_)[8] = residues_of(plan_.band);
  const int32_t (*rows_of_slots_)[8] = rpg::rows_of(plan_.band);
};

}  // namespace
}  // namespace rpg
