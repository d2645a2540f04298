// What the gradients of the unit law (unit_grads.h) are given, and how their workspace is divided:
// bytes for all threads, then for each of them; every piece begins with a cache line.

#pragma once

#include "cpu/chosen.h"
#include "cpu/unit_window.h"
#include "cpu/workspace.h"

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

constexpr int64_t kMostChunk = 16;    // octets of slots
constexpr int64_t kPackedOctets = 4;  // of dy, whose rows are packed together

struct UnitGradsArgs {
  Bank bank;  // the ring: [slots, block]; for dx
  bool dx;
  float* dw;            // [slots, block] or null
  float scale_of_sums;  // a factor of what is added to dw
  int threads;
  void* workspace;
  bool pairs;
};

// The layer's scale as a factor of dy, so that it costs nothing and dw may hold what other layers
// have added; with pairs, which round sums of dy, as one of what these sums give.
struct Scales {
  float dy, sums;
};

inline Scales scales_of(double scale, bool pairs) {
  const float value = static_cast<float>(scale);
  return {pairs ? 1.f : value, pairs ? value : 1.f};
}

// What the tiles of a Source take: bytes for all threads, and for each.
struct SourceLayout {
  int64_t dy, x;    // bytes, for all threads
  int64_t dx, own;  // bytes, for each thread: its dx, and what else it needs
  int64_t t_plane;  // floats from a line of T to the next
  int64_t chunk;    // octets of slots at a time, at most kMostChunk
  bool gathers;     // rows of x are gathered for each unit, into `own`
};

struct UnitGradsLayout {
  int64_t dy, x, x_words;
  int64_t dx, own, t, window, products, spill, entries, shuffled, octet_at;
  int64_t t_words, t_halves, own_words;
  int64_t shared() const { return dy + x + x_words; }
  int64_t of_thread() const {
    return dx + own + t + window + products + spill + entries + shuffled + octet_at + t_words +
           t_halves + own_words;
  }
};

struct UnitGradsMemory {
  float *dx, *own, *t, *window, *products, *spill;
  OctetEntry* entries;
  uint16_t *shuffled, *octet_at;
  uint32_t* t_words;   // [slots / 2, plane]: pairs of slots
  uint16_t* t_halves;  // [slots, plane], read as pairs of lanes
  uint32_t* own_words;
};

inline UnitGradsLayout unit_grads_layout(const LayerLaw& law, const UnitPlan& plan,
                                         const Chosen& chosen, const UnitGradsArgs& args,
                                         const SourceLayout& source) {
  UnitGradsLayout out{};
  const int64_t block = law.granularity, room = entries_room(plan.most_octets);
  const int64_t slots = source.chunk * kOctet;
  out.dy = lines(source.dy);
  out.x = args.dw ? lines(source.x) : 0;
  out.dx = args.dx ? lines(source.dx) : 0;
  out.own = lines(source.own);
  out.t = lines(4 * slots * source.t_plane);
  out.window = args.dx ? lines(4 * slots * block) : 0;
  out.products = args.dw ? lines(4 * slots * block) : 0;
  out.spill = args.dw ? lines(4 * kOctet * block) : 0;
  out.entries = lines(room * sizeof(OctetEntry));
  out.shuffled = lines(room * sizeof(uint16_t));
  out.octet_at = lines(room * sizeof(uint16_t));
  const int64_t t_bytes = lines(2 * slots * source.t_plane);
  out.t_words = args.pairs && args.dx ? t_bytes : 0;
  out.t_halves = args.pairs && args.dw ? t_bytes : 0;
  const int64_t words = args.pairs && args.dw ? lines(2 * source.t_plane * chosen.pitch()) : 0;
  out.x_words = source.gathers ? 0 : words * law.run_blocks;
  out.own_words = source.gathers ? words : 0;
  return out;
}

}  // namespace
}  // namespace rpg
