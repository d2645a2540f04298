// unit_linear_grads: dx [batch, K] = scale · dy [batch, N] · (G ring) and
// dw [slots, block] += scale · Gᵀ · (dyᵀ x), for the unit law; either or both.
//
// The mirror of unit_linear.cpp; what it does is in unit_grads.h, and lanes are rows of the batch.
// Memory, for units of 1024 rows on 256 slots of 64, 64 lanes, 4096 rows and columns:
//
//   dy in lanes             [N, L]               1 MB    L3, a group of it in L2; for all threads
//   x in rows               [K / block, L, block] 1 MB   L3; for all threads
//   dx                      [K / block, L, block] 1 MB   for each thread
//   T                       [8 kMostChunk, L]    32 KB   L1, L2; for each thread, as what follows
//   window                  [8 kMostChunk, block] 32 KB  copied where it is no fp32 or not whole
//   products for dw         [8 kMostChunk, block] 32 KB  where they cannot be added in place
//   entries, shuffled, uses [R / 8]              1 KB    L1
//   T in pairs              [8 kMostChunk, L / 2] words, 16 KB
//   x in pairs              [L / 2, block]       words, 8 KB

#include "cpu/lanes_linear.h"
#include "cpu/unit_grads.h"

namespace rpg::RPG_ISA {

namespace {

// T [slots of an octet, L], `plane` floats apart: what the octets of rows number at[0 ... count -
// 1] add to its 8 slots, where L is NV vectors. Returns the slots that are read, as bits. CHOSEN:
// only rows with a number among the chosen ones are there, under that number; `number_of` begins
// with the octets' group, as does dy where all are there.
template <int NV, bool CHOSEN>
uint32_t sum_octet(const OctetEntry* entry, const uint16_t* octets, int count, const float* dy,
                   const int32_t* number_of, const int32_t (*rows)[8], float* t, int64_t plane) {
  typedef Floats<kVector> Vector;
  constexpr int64_t kLanes = NV * kVector;
  uint32_t read = 0;
  for (int c = 0; c < 8; ++c, t += plane) {
    Vector sum[NV] = {};
    const auto add = [&](int64_t number, float of_row) {
      const float* line = dy + number * kLanes;
      const Vector sign = splat<kVector>(of_row);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sum[v] += sign * load<kVector>(line + v * kVector);
    };
    int64_t numbers[kMaxUnitLaps];
    float signs[kMaxUnitLaps];
    int found = 0;
    for (int u = 0; u < count; ++u) {
      const OctetEntry e = entry[octets[u]];
      const int row = rows[e.pattern][c];
      const int64_t number = kOctet * int64_t{octets[u]} + row;
      const float sign = kSigns[e.signs >> row & 1];
      if constexpr (CHOSEN) {  // without a branch, which nothing would foretell
        numbers[found] = number_of[number], signs[found] = sign;
        found += numbers[found] >= 0;
      } else {
        add(number, sign);
      }
    }
    for (int u = 0; u < found; ++u) add(numbers[u], signs[u]);
    read |= (found ? 1u : 0u) << c;
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store<kVector>(t + v * kVector, sum[v]);
  }
  return CHOSEN ? read : 0xFF;
}

// Lanes are rows of the batch.
class LinearSource {
 public:
  LinearSource(const UnitPlan& plan, const Chosen& chosen, const LanesLinearGradsArgs& args)
      : plan_(plan), chosen_(chosen), args_(args), scales_(scales_of(args.scale, args.pairs)) {}

  SourceLayout layout() const {
    const int64_t of_row = 4 * args_.lanes, columns = int64_t{plan_.band.columns} * chosen_.pitch();
    return {of_row * octets_for(chosen_.rows()) * kOctet,
            of_row * columns,
            of_row * columns,
            0,
            args_.lanes,
            kMostChunk,
            false};
  }

  static constexpr bool kReaches = false;  // every lane is reached by every row
  bool is_careful() const { return false; }
  void reach(int64_t, int64_t, uint32_t, uint8_t*) const {}
  float* dx_row(int64_t, int64_t, float*) const { return nullptr; }

  int64_t tiles() const { return (args_.batch + args_.lanes - 1) / args_.lanes; }
  // The last tile may have fewer rows than the others, and fewer lanes.
  int64_t lanes(int64_t tile) const { return lanes_for(rows_of(tile), args_.lanes); }
  void pack_dy(int64_t tile, int64_t octet, float* dy) const {
    const int64_t row = octet * kOctet;
    const int64_t all_rows = chosen_.rows();
    const int64_t columns = std::min<int64_t>(all_rows - row, kPackedOctets * kOctet);
    pack_lanes({args_.dtype, args_.dy}, tile * args_.lanes * all_rows + row, all_rows,
               rows_of(tile), columns, static_cast<int>(lanes(tile)), dy + row * lanes(tile));
    multiply_all(scales_.dy, columns * lanes(tile), dy + row * lanes(tile));
  }

  void pack_x(int64_t tile, int64_t column, float* x) const {
    const int pitch = chosen_.pitch();
    const int64_t stride = chosen_.elements();
    pack_rows({args_.dtype, args_.x}, tile * args_.lanes * stride + chosen_.first_element(column),
              stride, rows_of(tile), chosen_.count(column), static_cast<int>(lanes(tile)), pitch,
              pitch, x + column * lanes(tile) * pitch);
  }

  const float* x_of(int64_t tile, int64_t column, const float* x, float*) const {
    return x + column * lanes(tile) * chosen_.pitch();
  }

  uint32_t sum_octet(int64_t tile, int64_t, uint32_t first, uint32_t, const OctetEntry* entry,
                     const uint16_t* octets, int count, const int32_t (*rows)[8], const float* dy,
                     float* t) const {
    switch (lanes(tile) / kVector) {
      case 1: return sum_lanes<1>(first, entry, octets, count, rows, dy, t);
      case 2: return sum_lanes<2>(first, entry, octets, count, rows, dy, t);
      case 4: return sum_lanes<4>(first, entry, octets, count, rows, dy, t);
      case 8: return sum_lanes<8>(first, entry, octets, count, rows, dy, t);
      default: return sum_lanes<16>(first, entry, octets, count, rows, dy, t);
    }
  }

  template <class Element>
  void add_dx(int64_t tile, int64_t column, const FactorOf<Element>& t, const Element* window,
              int steps, float* dx, float*) const {
    const int padded = chosen_.padded(column), pitch = chosen_.pitch();
    multiply<true>(static_cast<int>(lanes(tile)), padded, t, window, padded, steps,
                   dx + column * lanes(tile) * pitch, pitch);
  }

  void write_dx(int64_t tile, int64_t column, const std::vector<float*>& parts) const {
    const int64_t pitch = chosen_.pitch(), size = element_bytes(args_.dtype);
    const int valid = chosen_.count(column);
    for (int64_t m = 0; m < rows_of(tile); ++m) {
      float out[128];
      for (int e = 0; e < valid; ++e) out[e] = 0;
      for (const float* part : parts) {
        const float* dx = part + (column * lanes(tile) + m) * pitch;
        for (int e = 0; e < valid; ++e) out[e] += dx[e];
      }
      for (int e = 0; e < valid; ++e) out[e] *= scales_.sums;
      void* target =
          static_cast<char*>(args_.dx) +
          ((tile * args_.lanes + m) * chosen_.elements() + chosen_.first_element(column)) * size;
      write_some(args_.dtype, out, valid, target);
    }
  }

 private:
  template <int NV>
  uint32_t sum_lanes(int64_t first, const OctetEntry* entry, const uint16_t* octets, int count,
                     const int32_t (*rows)[8], const float* dy, float* t) const {
    if (chosen_.has_rows()) {
      return rpg::RPG_ISA::sum_octet<NV, true>(
          entry, octets, count, dy, chosen_.number_of() + first * kOctet, rows, t, args_.lanes);
    }
    return rpg::RPG_ISA::sum_octet<NV, false>(
        entry, octets, count, dy + first * kOctet * NV * kVector, nullptr, rows, t, args_.lanes);
  }

  int64_t rows_of(int64_t tile) const {
    return std::min<int64_t>(args_.batch - tile * args_.lanes, args_.lanes);
  }

  const UnitPlan& plan_;
  const Chosen& chosen_;
  const LanesLinearGradsArgs& args_;
  Scales scales_;
};

UnitGradsArgs grads_args(const LanesLinearGradsArgs& args) {
  const float scale = scales_of(args.scale, args.pairs).sums;
  return {args.bank, args.dx != nullptr, args.dw, scale, args.threads, args.workspace, args.pairs};
}

}  // namespace

Workspace unit_linear_grads_workspace(const LayerLaw& law, const LanesLinearGradsArgs& args) {
  const UnitPlan plan(law);
  const Chosen chosen(law, plan, args.selection, args.columns);
  const SourceLayout source = LinearSource(plan, chosen, args).layout();
  const UnitGradsLayout layout = unit_grads_layout(law, plan, chosen, grads_args(args), source);
  return {layout.shared() + args.threads * layout.of_thread() + plan.bytes() + chosen.bytes(),
          layout.shared() + args.threads * layout.dx};
}

void unit_linear_grads(const LayerLaw& law, const LanesLinearGradsArgs& args) {
  const UnitPlan plan(law);
  const Chosen chosen(law, plan, args.selection, args.columns);
  const LinearSource source(plan, chosen, args);
  const UnitGradsArgs of_layer = grads_args(args);
  UnitGrads<LinearSource>(law, plan, chosen, of_layer, source).run();
}

}  // namespace rpg::RPG_ISA
