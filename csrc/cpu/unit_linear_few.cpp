// unit_linear_few: y [batch, N] = scale · x [batch, K] · (G ring)ᵀ + bias for the unit law and up
// to 4 rows of x, where reading the bank takes as long as multiplying.
//
// A unit, R rows of a column of blocks, reads W slots of a window. With x_b [M, block]:
//
//   S [W / 8, M, 8]  = window · x_bᵀ         dot products, 8 slots of the bank at a time
//   y [R / 8, M, 8] += ± S [octet] [order]   one permuted vector for 8 rows
//
// The bank is read as it is stored, bfloat16 without a conversion in memory: of a word with two
// elements, the even one is its lower half shifted up and the odd one its upper half, so x_b has
// its even elements first. Codes of int8 become floats in registers, and a slot's scale is a factor
// of its S. Slots that the bank lacks have an S of zero; those that it has are multiplied 8 at a
// time.
//
// S of 256 slots has 1 KB for a row of x; y [N] stays in L1 and L2. Per weight read: block / V
// multiply-adds of V lanes and, for bfloat16, 3 / V instructions more, for int8 2 block / V; per
// octet of rows: an entry, a load of S, a permutation, a sign and an addition.
//
// Threads share the columns, and add up what they have in order.
//
// With a selection (chosen.h) x_b has zeros where a column is not chosen, and the bank's words are
// masked there, which takes an instruction for a vector of it; squeezing them would take three. All
// rows of an octet are added together, so only groups without a chosen row are left out.

#include <vector>

#include "cpu/chosen.h"
#include "cpu/dot_octet.h"
#include "cpu/lanes_linear.h"
#include "cpu/unit_sums.h"

namespace rpg::RPG_ISA {

namespace {

// How the workspace is divided; bytes of one thread.
struct FewLayout {
  int64_t x, mask, s, y, rows, entries, shuffled;
  int64_t bytes() const { return x + mask + s + y + rows + entries + shuffled; }
};

FewLayout layout_of(const LayerLaw& law, const UnitPlan& plan, const LanesLinearArgs& args) {
  FewLayout out{};
  const int64_t room = entries_room(plan.most_octets);
  out.x = lines(4 * args.lanes * law.granularity);
  out.mask = args.selection.columns ? lines(4 * law.granularity) : 0;
  out.s = lines(4 * plan.most_window * kOctet * args.lanes);
  out.y = lines(4 * int64_t{plan.band.octets} * kOctet * args.lanes);
  out.rows = lines(4 * kOctet * law.granularity);
  out.entries = lines(room * sizeof(OctetEntry));
  out.shuffled = lines(room * sizeof(uint16_t));
  return out;
}

class UnitLinearFew {
 public:
  UnitLinearFew(const LayerLaw& law, const LanesLinearArgs& args)
      : law_(law),
        args_(args),
        plan_(law),
        chosen_(law, plan_, args.selection, args.columns),
        layout_(layout_of(law, plan_, args)),
        ring_{args.bank, int64_t{law.slots}, law.granularity} {}

  void run() {
#pragma omp parallel num_threads(args_.threads)
    {
#pragma omp for schedule(static)
      for (int part = 0; part < args_.threads; ++part) {
        switch (args_.lanes) {
          case 1: add_columns<1>(part); break;
          case 2: add_columns<2>(part); break;
          default: add_columns<4>(part); break;
        }
      }
#pragma omp for schedule(static)
      for (int part = 0; part < args_.threads; ++part) write(part);
    }
  }

 private:
  struct FewMemory {
    float* x;
    int32_t* mask;
    float *s, *y, *rows;
    OctetEntry* entries;
    uint16_t* shuffled;
  };

  FewMemory memory_of(int part) const {
    Carver carver(args_.workspace, part * layout_.bytes());
    FewMemory out{};
    carver.take(out.x, layout_.x), carver.take(out.mask, layout_.mask);
    carver.take(out.s, layout_.s), carver.take(out.y, layout_.y);
    carver.take(out.rows, layout_.rows), carver.take(out.entries, layout_.entries);
    carver.take(out.shuffled, layout_.shuffled);
    return out;
  }

  // x_b [M, block], zeros where it ends before and where a column is not chosen.
  void load_x(const FewMemory& memory, int64_t column, bool pairs) const {
    const int block = law_.granularity;
    const Activations x{args_.x_dtype, args_.x};
    for (int m = 0; m < args_.lanes; ++m) {
      float* target = memory.x + m * block;
      std::memset(target, 0, sizeof(float) * block);
      if (m >= args_.batch) continue;
      const void* source = x.element(m * chosen_.elements() + chosen_.first_element(column));
      if (chosen_.has_columns()) {
        float values[128] = {};
        read_some(x.dtype, source, chosen_.count(column), values);
        chosen_.spread(column, values, target);
      } else {
        read_some(x.dtype, source, chosen_.count(column), target);
      }
      if (!pairs) continue;
      for (int e = 0; e < block; e += 2 * kDotVector) {
        float split[2 * kDotVector];
        for (int i = 0; i < 2 * kDotVector; ++i) {
          split[i % 2 * kDotVector + i / 2] = target[e + i];
        }
        std::memcpy(target + e, split, sizeof split);
      }
    }
  }

  // Which bits of a slot are of chosen columns.
  void fill_mask(const FewMemory& memory, int64_t column, bool pairs) const {
    const int size = pairs ? 2 : 4;
    std::memset(memory.mask, 0, size * law_.granularity);
    for (int i = 0; i < chosen_.count(column); ++i) {
      const int element = chosen_.element(column, i);
      std::memset(reinterpret_cast<char*>(memory.mask) + element * size, 0xFF, size);
    }
  }

  template <int M>
  void add_columns(int part) const {
    const FewMemory memory = memory_of(part);
    const int64_t columns = chosen_.columns();
    const int block = law_.granularity;
    const int64_t low = columns * part / args_.threads, high = columns * (part + 1) / args_.threads;
    if (low == high) return;
    std::memset(memory.y, 0, layout_.y);
    for (int64_t i = low; i < high; ++i) {
      const uint32_t column = chosen_.column(i);
      // A mask leaves out what a block lacks at its end, too.
      const int valid = chosen_.has_columns() ? block : chosen_.count(column);
      const bool pairs = ring_.dtype == Dtype::kBfloat16 && valid == block;
      load_x(memory, column, pairs);
      if (chosen_.has_columns()) fill_mask(memory, column, pairs);
      for (uint32_t group = 0; group < plan_.band.groups; ++group) {
        if (!chosen_.rows_of(plan_, group)) continue;
        const PlannedUnit& planned = plan_.unit_of(group, column);
        dot_window<M>(planned.window, valid, pairs, memory);
        unit_entries(plan_.band, planned.unit, planned.window, memory.entries, memory.shuffled);
        add_octets<M>(memory.entries, group_size(plan_.band, group), memory.s,
                      residues_of(plan_.band),
                      memory.y + int64_t{first_octet(plan_.band, group)} * kOctet * M);
      }
    }
  }

  template <int M>
  void dot_window(const UnitWindow& window, int valid, bool pairs, const FewMemory& memory) const {
    if (ring_.places) return dot_present<M>(window, valid, pairs, memory);
    if (ring_.scales) return dot_codes<M>(window, memory);
    const int block = law_.granularity;
    const int64_t stride = ring_.row_bytes();
    const bool stored = pairs || (ring_.dtype == Dtype::kFloat32 && valid == block);
    int64_t first = window.base;
    for (uint32_t o = 0; o < window.octets; ++o) {
      float* s = memory.s + int64_t{o} * M * 8;
      const char* slots = static_cast<const char*>(ring_.data) + first * stride;
      if (!stored || first + kOctet > ring_.slots) {
        // Around the end of the ring, of a dtype that is converted, or with a part of no weights,
        // which may hold infinities.
        slots = copy_octet(first, valid, pairs, memory);
      }
      dot_floats<M>(SlotsInRow{slots, pairs ? stride : 4 * block}, pairs, memory, s);
      first = (first + kOctet) % ring_.slots;
    }
  }

  // S of 8 slots that are no codes.
  template <int M, class Slots>
  void dot_floats(const Slots& slots, bool pairs, const FewMemory& memory, float* s) const {
    if (chosen_.has_columns()) {
      dot_masked<M, true>(slots, pairs, memory, s);
    } else {
      dot_masked<M, false>(slots, pairs, memory, s);
    }
  }
  template <int M, bool MASKED, class Slots>
  void dot_masked(const Slots& slots, bool pairs, const FewMemory& memory, float* s) const {
    const int block = law_.granularity;
    if (pairs) {
      dot_octet<M, Form::kPairs, MASKED>(slots, memory.mask, memory.x, block, s);
    } else {
      dot_octet<M, Form::kFloats, MASKED>(slots, memory.mask, memory.x, block, s);
    }
  }

  // S of a window whose slots are codes. A whole block is multiplied even where x ends before it or
  // columns are not chosen: x has zeros there, and no code is infinite.
  template <int M>
  void dot_codes(const UnitWindow& window, const FewMemory& memory) const {
    const int block = law_.granularity;
    const int64_t mask = (int64_t{1} << ring_.shift) - 1;
    int64_t first = window.base;
    for (uint32_t o = 0; o < window.octets; ++o) {
      float* s = memory.s + int64_t{o} * M * 8;
      alignas(32) float scale[8];
      if (first + kOctet <= ring_.slots) {
        const float* scales = ring_.scales + (first >> ring_.shift);
        for (int i = 0; i < 8; ++i) scale[i] = scales[((first & mask) + i) >> ring_.shift];
        dot_octet<M, Form::kCodes, false>(SlotsInRow{ring_.slot(first), block}, nullptr, memory.x,
                                          block, s);
      } else {
        SlotsApart apart;
        for (int i = 0; i < 8; ++i) {
          const int64_t slot = (first + i) % ring_.slots;
          apart.slot[i] = ring_.slot(slot), scale[i] = ring_.scale_of(slot);
        }
        dot_octet<M, Form::kCodes, false>(apart, nullptr, memory.x, block, s);
      }
      for (int m = 0; m < M; ++m) store<8>(s + m * 8, load<8>(s + m * 8) * load<8>(scale));
      first = (first + kOctet) % ring_.slots;
    }
  }

  // S of a window of which the bank lacks slots: 8 of those that it has at a time.
  template <int M>
  void dot_present(const UnitWindow& window, int valid, bool pairs, const FewMemory& memory) const {
    const int64_t slots = window.octets * int64_t{kOctet}, block = law_.granularity;
    std::memset(memory.s, 0, sizeof(float) * M * slots);
    // Codes are read as they are; a row with a part of no weights, which may hold infinities, is
    // not, nor is what has another dtype.
    const bool copied =
        !ring_.scales && !pairs && (ring_.dtype != Dtype::kFloat32 || valid < block);
    SlotsApart apart;
    int64_t target[8];  // in S
    float scale[8];
    int count = 0;
    for (int64_t k = 0, slot = window.base; k < slots; ++k) {
      if (ring_.has(slot)) {
        apart.slot[count] = ring_.find(slot);
        scale[count] = ring_.scale_of(slot);
        if (copied) {
          float* row = memory.rows + count * block;
          read_slot(ring_, slot, valid, row);
          std::memset(row + valid, 0, sizeof(float) * (block - valid));
          apart.slot[count] = reinterpret_cast<const char*>(row);
        }
        target[count++] = k / kOctet * kOctet * M + k % kOctet;
      }
      if (++slot == ring_.slots) slot = 0;
      if (count < 8 && (k + 1 < slots || !count)) continue;
      for (int i = count; i < 8; ++i) apart.slot[i] = apart.slot[0];
      alignas(32) float s[8 * M];
      if (ring_.scales) {
        dot_octet<M, Form::kCodes, false>(apart, nullptr, memory.x, law_.granularity, s);
      } else {
        dot_floats<M>(apart, pairs, memory, s);
      }
      for (int i = 0; i < count; ++i) {
        for (int m = 0; m < M; ++m) memory.s[target[i] + m * 8] = scale[i] * s[m * 8 + i];
      }
      count = 0;
    }
  }

  const char* copy_octet(int64_t first, int valid, bool pairs, const FewMemory& memory) const {
    char* target = reinterpret_cast<char*>(memory.rows);
    const int64_t stride = ring_.row_bytes(), block = law_.granularity;
    for (int64_t i = 0; i < kOctet; ++i) {
      const char* source =
          static_cast<const char*>(ring_.data) + (first + i) % ring_.slots * stride;
      if (pairs) {
        std::memcpy(target + i * stride, source, stride);
      } else {
        read_some(ring_.dtype, source, valid, memory.rows + i * block);
        std::memset(memory.rows + i * block + valid, 0, sizeof(float) * (block - valid));
      }
    }
    return target;
  }

  // This part's share of the rows, of which every part has summed some columns.
  void write(int part) const {
    const int64_t octets = plan_.band.octets, columns = chosen_.columns(), lanes = args_.lanes;
    const int64_t threads = args_.threads, size = element_bytes(args_.x_dtype);
    std::vector<const float*> sums;
    for (int64_t peer = 0; peer < threads; ++peer) {
      if (columns * peer / threads < columns * (peer + 1) / threads) {
        sums.push_back(memory_of(static_cast<int>(peer)).y);
      }
    }
    const Floats<8> scale = splat<8>(static_cast<float>(args_.scale));
    for (int64_t i = octets * part / threads; i < octets * (part + 1) / threads; ++i) {
      const int64_t row = chosen_.first_row(i);
      const int valid = static_cast<int>(chosen_.first_row(i + 1) - row);
      if (!valid) continue;
      alignas(32) float bias[8] = {}, out[8];
      if (args_.bias) std::memcpy(bias, args_.bias + row, sizeof(float) * valid);
      for (int64_t m = 0; m < args_.batch; ++m) {
        Floats<8> total = load<8>(sums[0] + (i * lanes + m) * 8);
        for (size_t k = 1; k < sums.size(); ++k) total += load<8>(sums[k] + (i * lanes + m) * 8);
        if (chosen_.has_rows()) total = in_front(total, row, valid);
        store<8>(out, total * scale + load<8>(bias));
        write_some(args_.x_dtype, out, valid,
                   static_cast<char*>(args_.y) + (m * chosen_.rows() + row) * size);
      }
    }
  }

  // An octet's sums with those of its chosen rows first: `count` of them, from number `row` on.
  Floats<8> in_front(const Floats<8>& sums, int64_t row, int count) const {
    alignas(32) float of_rows[8], out[8] = {};
    store<8>(of_rows, sums);
    for (int r = 0; r < count; ++r) out[r] = of_rows[chosen_.row(row + r) % kOctet];
    return load<8>(out);
  }

  const LayerLaw& law_;
  const LanesLinearArgs& args_;
  UnitPlan plan_;
  Chosen chosen_;
  FewLayout layout_;
  Ring ring_;
};

}  // namespace

Workspace unit_linear_few_workspace(const LayerLaw& law, const LanesLinearArgs& args) {
  const UnitPlan plan(law);
  const Chosen chosen(law, plan, args.selection, args.columns);
  const FewLayout layout = layout_of(law, plan, args);
  return {args.threads * layout.bytes() + plan.bytes() + chosen.bytes(), args.threads * layout.x};
}

void unit_linear_few(const LayerLaw& law, const LanesLinearArgs& args) {
  UnitLinearFew(law, args).run();
}

}  // namespace rpg::RPG_ISA
