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
// 1] add to its 8 slots, where L is NV vectors.
template <int NV>
void sum_octet(const OctetEntry* entry, const uint16_t* octets, int count, const float* dy,
               const int32_t (*rows)[8], float* t, int64_t plane) {
  typedef Floats<kVector> Vector;
  constexpr int64_t kLanes = NV * kVector;
  for (int c = 0; c < 8; ++c, t += plane) {
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

// Lanes are rows of the batch.
class LinearSource {
 public:
  LinearSource(const LayerLaw& law, const UnitPlan& plan, const LanesLinearGradsArgs& args)
      : law_(law), plan_(plan), args_(args), scales_(scales_of(args.scale, args.pairs)) {}

  SourceLayout layout() const {
    const int64_t of_row = 4 * args_.lanes, columns = law_.blocks * law_.granularity;
    return {of_row * plan_.band.octets * kOctet,
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
  int valid_of(int64_t column) const {
    return static_cast<int>(
        std::min<int64_t>(args_.columns - column * law_.granularity, law_.granularity));
  }

  void pack_dy(int64_t tile, int64_t octet, float* dy) const {
    const int64_t row = octet * kOctet;
    const int64_t columns = std::min<int64_t>(law_.rows - row, kPackedOctets * kOctet);
    pack_lanes({args_.dtype, args_.dy}, tile * args_.lanes * law_.rows + row, law_.rows,
               rows_of(tile), columns, static_cast<int>(lanes(tile)), dy + row * lanes(tile));
    multiply_all(scales_.dy, columns * lanes(tile), dy + row * lanes(tile));
  }

  void pack_x(int64_t tile, int64_t column, float* x) const {
    const int block = law_.granularity;
    pack_rows({args_.dtype, args_.x}, tile * args_.lanes * args_.columns + column * block,
              args_.columns, rows_of(tile), args_.columns - column * block,
              static_cast<int>(lanes(tile)), block, block, x + column * lanes(tile) * block);
  }

  const float* x_of(int64_t tile, int64_t column, const float* x, float*) const {
    return x + column * lanes(tile) * law_.granularity;
  }

  void sum_octet(int64_t tile, int64_t, uint32_t first, uint32_t, const OctetEntry* entry,
                 const uint16_t* octets, int count, const int32_t (*rows)[8], const float* dy,
                 float* t) const {
    const float* of_group = dy + int64_t{first} * kOctet * lanes(tile);
    switch (lanes(tile) / kVector) {
      case 1:
        return rpg::RPG_ISA::sum_octet<1>(entry, octets, count, of_group, rows, t, args_.lanes);
      case 2:
        return rpg::RPG_ISA::sum_octet<2>(entry, octets, count, of_group, rows, t, args_.lanes);
      case 4:
        return rpg::RPG_ISA::sum_octet<4>(entry, octets, count, of_group, rows, t, args_.lanes);
      case 8:
        return rpg::RPG_ISA::sum_octet<8>(entry, octets, count, of_group, rows, t, args_.lanes);
      default:
        return rpg::RPG_ISA::sum_octet<16>(entry, octets, count, of_group, rows, t, args_.lanes);
    }
  }

  template <class Element>
  void add_dx(int64_t tile, int64_t column, const FactorOf<Element>& t, const Element* window,
              int steps, float* dx, float*) const {
    const int block = law_.granularity;
    multiply<true>(static_cast<int>(lanes(tile)), block, t, window, block, steps,
                   dx + column * lanes(tile) * block, block);
  }

  void write_dx(int64_t tile, int64_t column, const std::vector<float*>& parts) const {
    const int64_t block = law_.granularity, size = element_bytes(args_.dtype);
    const int valid = valid_of(column);
    for (int64_t m = 0; m < rows_of(tile); ++m) {
      float out[128];
      for (int e = 0; e < valid; ++e) out[e] = 0;
      for (const float* part : parts) {
        const float* dx = part + (column * lanes(tile) + m) * block;
        for (int e = 0; e < valid; ++e) out[e] += dx[e];
      }
      for (int e = 0; e < valid; ++e) out[e] *= scales_.sums;
      void* target = static_cast<char*>(args_.dx) +
                     ((tile * args_.lanes + m) * args_.columns + column * block) * size;
      write_some(args_.dtype, out, valid, target);
    }
  }

 private:
  int64_t rows_of(int64_t tile) const {
    return std::min<int64_t>(args_.batch - tile * args_.lanes, args_.lanes);
  }

  const LayerLaw& law_;
  const UnitPlan& plan_;
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
  const SourceLayout source = LinearSource(law, plan, args).layout();
  const UnitGradsLayout layout = unit_grads_layout(law, plan, grads_args(args), source);
  return {layout.shared() + args.threads * layout.of_thread() + plan.bytes(),
          layout.shared() + args.threads * layout.dx};
}

void unit_linear_grads(const LayerLaw& law, const LanesLinearGradsArgs& args) {
  const UnitPlan plan(law);
  const LinearSource source(law, plan, args);
  const UnitGradsArgs of_layer = grads_args(args);
  UnitGrads<LinearSource>(law, plan, of_layer, source).run();
}

}  // namespace rpg::RPG_ISA
