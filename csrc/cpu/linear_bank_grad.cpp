// linear_bank_grad: dw [slots, block] += scale · Gᵀ · (dy [batch, N]ᵀ x [batch, K]); neither Ŵ nor
// its gradient is ever in memory.
//
// In a piece of a column, dy of the rows that read the same slot are added up first, T[slot] += ±
// dy, then dw[slot] += T[slot] · x_b (factor.h): products as the forward, and no two threads write
// the same of dw.
//
// Window law: cells are taken in the order of addresses, as many at a time as there are whole
// windows on the ring; their windows do not touch each other, so each is one thread's. An element
// gets its contributions in the order of addresses, whatever the number of threads. Law 1: each
// part has a gradient of its own for its columns, and they are added in the order of parts.

#include <algorithm>
#include <type_traits>

#include "cpu/linear.h"
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu/batch.h"
#include "cpu/instance.h"

namespace rpg::RPG_ISA {

namespace {

constexpr int kRowsOfDy = 64;       // that are loaded together
constexpr int64_t kTermsStep = 16;  // terms: a cache line of their slots

inline int thread() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// How the workspace is divided.
template <class Walk>
struct BankGradLayout {
  int64_t entries;  // bytes, of one part
  int64_t terms;    // of one part: T [terms, BATCH] and their slots
  int64_t dw;       // floats of one part: a gradient of its own, law 1
  int64_t dy, x;    // floats of all parts
  int64_t per_part(int batch_tile) const { return entries + 4 * (terms * (batch_tile + 1) + dw); }

  BankGradLayout(const LayerLaw& law, int batch_tile, int tiles, int threads) {
    entries = Walk::kEntries * static_cast<int64_t>(sizeof(typename Walk::Entry));
    const int64_t slots = law.window ? law.window : law.slots;
    terms = std::max<int64_t>(
        kTerms, slots < law.rows ? (slots + kTermsStep - 1) / kTermsStep * kTermsStep : 0);
    dw = law.window || threads == 1 ? 0 : int64_t{law.slots} * law.granularity;
    dy = (law.rows + kRowsOfDy - 1) / kRowsOfDy * kRowsOfDy * batch_tile * tiles;
    x = law.blocks * law.granularity * batch_tile * tiles;
  }
};

template <int BLOCK, int BATCH, class Walk>
class BankGrad {
  using Entry = typename Walk::Entry;
  using DyTiles = BatchTiles<kRowsOfDy, BATCH, false>;
  using XRowTiles = BatchTiles<BLOCK, BATCH, true>;

 public:
  BankGrad(const LayerLaw& law, const LinearBankGradArgs& args)
      : law_(law),
        args_(args),
        strips_(strips_of<Walk>(law, law.rows)),
        layout_(law, BATCH, args.tiles, args.threads) {}

  void run() {
    const int64_t step = int64_t{BATCH} * args_.tiles;
    float* memory = static_cast<float*>(args_.workspace);
    const int64_t groups = (law_.rows + kRowsOfDy - 1) / kRowsOfDy;
    for (int64_t m0 = 0; m0 < args_.batch; m0 += step) {
      const int64_t rows = std::min(step, args_.batch - m0);
      const DyTiles dy{memory, groups, rows};
      const XRowTiles x{memory + layout_.dy, law_.blocks, rows};
#pragma omp parallel num_threads(args_.threads)
      {
#pragma omp for schedule(static)
        for (int64_t group = 0; group < groups; ++group) {
          dy.load(args_.dtype, args_.dy, law_.rows, m0, group);
        }
#pragma omp for schedule(static)
        for (int64_t block = 0; block < law_.blocks; ++block) {
          x.load(args_.dtype, args_.x, args_.columns, m0, block);
        }
        if constexpr (std::is_same<Walk, WindowWalk>::value) {
          by_windows(dy, x);
        } else {
          by_parts(dy, x);
        }
      }
    }
  }

 private:
  struct PartMemory {
    Entry* entry;
    float* t;
    int32_t* slot;
    float* dw;
  };
  PartMemory memory_of(int part) const {
    char* bytes = static_cast<char*>(args_.workspace) + 4 * (layout_.dy + layout_.x) +
                  part * layout_.per_part(BATCH);
    float* t = reinterpret_cast<float*>(bytes + layout_.entries);
    float* slot = t + layout_.terms * BATCH;
    return {reinterpret_cast<Entry*>(bytes), t, reinterpret_cast<int32_t*>(slot),
            layout_.dw ? slot + layout_.terms : args_.dw};
  }

  // Adds what one piece of a column contributes to `dw`.
  void add(const Piece<Entry>& piece, const DyTiles& dy, const XRowTiles& x,
           const PartMemory& memory) const {
    const int64_t left = args_.columns - piece.block * BLOCK;
    const int valid = static_cast<int>(left < BLOCK ? left : BLOCK);
    float* const first = memory.dw + int64_t{piece.base} * BLOCK;
    float* const part[2] = {first, first - int64_t{law_.slots} * BLOCK};
    const int64_t before_end = int64_t{law_.slots} - piece.base;
    for (int tile = 0; tile < x.count(); ++tile) {
      const float* rows = dy.block_of(tile, 0) + (piece.strip->row + piece.row) * BATCH;
      for_terms<BATCH>(piece.entry, piece.count, piece.slots, piece.whole, rows, memory.t,
                       memory.slot, [&](const Terms& terms) {
                         add_bank_grad<BLOCK, BATCH>(
                             terms, x.block_of(tile, piece.block), x.rows_of(tile), valid,
                             static_cast<float>(args_.scale), part, before_end);
                       });
    }
  }

  // Inside a parallel region, as by_parts.
  void by_windows(const DyTiles& dy, const XRowTiles& x) const {
    const PartMemory memory = memory_of(thread());
    const int64_t together = law_.slots / law_.window;
    WindowWalk walk(law_);
    size_t strip = 0;
    for (int64_t band = 0; band < bands_of(law_); ++band) {
      while (strips_[strip].band < band) ++strip;
      walk.enter(band);
      const int64_t cells = walk.cells();
      for (int64_t first = 0; first < cells; first += together) {
#pragma omp for schedule(dynamic)
        for (int64_t cell = first; cell < std::min(first + together, cells); ++cell) {
          walk.walk_cell(strips_, strip, cell, memory.entry,
                         [&](const Piece<Entry>& piece) { add(piece, dy, x, memory); });
        }
      }
    }
  }

  void by_parts(const DyTiles& dy, const XRowTiles& x) const {
#pragma omp for schedule(static)
    for (int part = 0; part < args_.threads; ++part) {
      const PartMemory memory = memory_of(part);
      if (layout_.dw) std::memset(memory.dw, 0, sizeof(float) * layout_.dw);
      Walk walk(law_);
      for (const Strip& strip : strips_) {
        walk.walk(strip, law_.blocks * part / args_.threads,
                  law_.blocks * (part + 1) / args_.threads, memory.entry,
                  [&](const Piece<Entry>& piece) { add(piece, dy, x, memory); });
      }
    }
    if (!layout_.dw) return;
#pragma omp for schedule(static)
    for (int64_t slot = 0; slot < int64_t{law_.slots}; ++slot) {
      for (int part = 0; part < args_.threads; ++part) {
        const float* part_dw = memory_of(part).dw + slot * BLOCK;
#pragma omp simd
        for (int e = 0; e < BLOCK; ++e) args_.dw[slot * BLOCK + e] += part_dw[e];
      }
    }
  }

  const LayerLaw& law_;
  const LinearBankGradArgs& args_;
  std::vector<Strip> strips_;
  BankGradLayout<Walk> layout_;
};

template <class Walk>
Workspace workspace(const LayerLaw& law, const LinearBankGradArgs& args) {
  const BankGradLayout<Walk> layout(law, args.batch_tile, args.tiles, args.threads);
  const int64_t activations = 4 * (layout.dy + layout.x);
  return {activations + args.threads * layout.per_part(args.batch_tile), activations};
}

}  // namespace

Workspace linear_bank_grad_workspace(const LayerLaw& law, const LinearBankGradArgs& args) {
  return law.window ? workspace<WindowWalk>(law, args) : workspace<RingWalk>(law, args);
}

void linear_bank_grad(const LayerLaw& law, const LinearBankGradArgs& args) {
  run_instance<BankGrad>(law, args);
}

}  // namespace rpg::RPG_ISA
