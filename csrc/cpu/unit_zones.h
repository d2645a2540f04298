// Threads share the ring: each owns the slots of a *zone*, as many uses in each, so that no two
// write the same of a gradient. Slots behind the end of a zone that belong to its last octet go to
// memory of their own, the spill, and are added in the end.

#pragma once

#include <vector>

#include "cpu/unit_window.h"

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

class UnitZones {
 public:
  // Zones of slots counted from the first that the layer reads, around the ring: its octets follow
  // each other, so the first `rest` slots are in one octet more than the others.
  UnitZones(const LayerLaw& law, const UnitPlan& plan, int threads)
      : base_(plan.band.base), slots_(law.slots) {
    const int64_t laps = law.laps;
    const int64_t uses = int64_t{plan.band.octets} * law.blocks + plan.band.offset;
    const int64_t read = (uses + laps - 1) / laps * kOctet, rest = read % slots_,
                  passes = read / slots_;
    begin_.push_back(0);
    for (int part = 1; part < threads; ++part) {
      const int64_t wanted = read * part / threads;
      const int64_t place = wanted < rest * (passes + 1)
                                ? wanted / (passes + 1)
                                : rest + (wanted - rest * (passes + 1)) / passes;
      if (place >= begin_.back() + kOctet && place + kOctet <= slots_) begin_.push_back(place);
    }
    begin_.push_back(slots_);
  }

  int count() const { return static_cast<int>(begin_.size()) - 1; }

  // Calls visit(o, count) for the octets o ... o + count - 1 of a window that begin in a zone: some
  // in a row, again after each turn.
  template <class Visit>
  void for_octets(int zone, const UnitWindow& window, const Visit& visit) const {
    const int64_t low = begin_[zone], high = begin_[zone + 1];
    int64_t first = place_of(window.base);
    for (int64_t o = 0; o < window.octets;) {
      const int64_t limit = first < low ? low : first < high ? high : slots_;
      const int64_t count =
          std::min<int64_t>((limit - first + kOctet - 1) / kOctet, window.octets - o);
      if (first >= low && first < high) visit(o, count);
      o += count;
      first = (first + count * kOctet) % slots_;
    }
  }

  // How many of `size` slots from `first` on are in the zone, up to the end of the ring.
  int64_t inside(int zone, int64_t first, int64_t size) const {
    const int64_t end = (base_ + begin_[zone + 1] - 1) % slots_ + 1;
    return first < end ? std::min(size, end - first) : std::min(size, slots_ - first);
  }

  // Where a slot's gradient goes: to dw [slots, block], or to the zone's spill [8, block].
  float* target(int zone, int64_t slot, float* dw, float* spill, int64_t block) const {
    const int64_t place = place_of(slot);
    if (place >= begin_[zone] && place < begin_[zone + 1]) return dw + slot % slots_ * block;
    return spill + (place - begin_[zone + 1] + slots_) % slots_ * block;
  }

  void add_spill(int zone, const float* spill, float* dw, int64_t block) const {
    for (int64_t j = 0; j < kOctet; ++j) {
      float* out = dw + (base_ + begin_[zone + 1] + j) % slots_ * block;
      for (int64_t e = 0; e < block; ++e) out[e] += spill[j * block + e];
    }
  }

 private:
  int64_t place_of(int64_t slot) const { return (slot - base_ + 2 * slots_) % slots_; }

  int64_t base_, slots_;
  std::vector<int64_t> begin_;
};

}  // namespace
}  // namespace rpg
