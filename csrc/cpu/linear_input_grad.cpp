// linear_input_grad: dx [batch, K] = scale · dy [batch, N] · (G ring), Ŵ = G ring never in memory.
//
// The mirror of linear.cpp: in a piece of a column, rows that read the same slot are added up
// first, T[slot] += ± dy, and dx of the column's block is T · window (factor.h). Columns are dealt
// to threads whole, over all strips, so that no two write the same of dx: results do not depend on
// the number of threads. Per position: a table entry and BATCH sums read and written; products as
// the forward.

#include <algorithm>

#include "cpu/batch.h"
#include "cpu/instance.h"
#include "cpu/linear.h"

namespace rpg::RPG_ISA {

namespace {

constexpr int kRowsOfDy = 64;       // that are loaded together
constexpr int64_t kTermsStep = 16;  // terms: a cache line of their slots

// How the workspace is divided.
template <class Walk>
struct InputGradLayout {
  int64_t entries;  // bytes, of one part
  int64_t terms;    // of one part: T [terms, BATCH] and their slots
  int64_t dy, dx;   // floats of all parts
  int64_t per_part(int batch_tile) const { return entries + 4 * terms * (batch_tile + 1); }

  InputGradLayout(const LayerLaw& law, int batch_tile, int tiles) {
    entries = Walk::kEntries * static_cast<int64_t>(sizeof(typename Walk::Entry));
    const int64_t slots = law.window ? law.window : law.slots;
    terms = std::max<int64_t>(
        kTerms, slots < law.rows ? (slots + kTermsStep - 1) / kTermsStep * kTermsStep : 0);
    dy = (law.rows + kRowsOfDy - 1) / kRowsOfDy * kRowsOfDy * batch_tile * tiles;
    dx = law.blocks * law.granularity * batch_tile * tiles;
  }
};

template <int BLOCK, int BATCH, class Walk>
class InputGrad {
  using Entry = typename Walk::Entry;
  using DyTiles = BatchTiles<kRowsOfDy, BATCH, false>;
  using DxTiles = BatchTiles<BLOCK, BATCH, by_row(BATCH)>;

 public:
  InputGrad(const LayerLaw& law, const LinearInputGradArgs& args)
      : law_(law),
        args_(args),
        strips_(strips_of<Walk>(law, law.rows)),
        layout_(law, BATCH, args.tiles) {}

  void run() {
    const int64_t step = int64_t{BATCH} * args_.tiles;
    float* memory = static_cast<float*>(args_.workspace);
    const int64_t groups = (law_.rows + kRowsOfDy - 1) / kRowsOfDy;
    for (int64_t m0 = 0; m0 < args_.batch; m0 += step) {
      const int64_t rows = std::min(step, args_.batch - m0);
      const DyTiles dy{memory, groups, rows};
      const DxTiles dx{memory + layout_.dy, law_.blocks, rows};
#pragma omp parallel num_threads(args_.threads)
      {
#pragma omp for schedule(static)
        for (int64_t group = 0; group < groups; ++group) {
          dy.load(args_.dy_dtype, args_.dy, law_.rows, m0, group);
        }
#pragma omp for schedule(static)
        for (int part = 0; part < args_.threads; ++part) work(part, dy, dx, m0);
      }
    }
  }

 private:
  void work(int part, const DyTiles& dy, const DxTiles& dx, int64_t m0) const {
    char* bytes = static_cast<char*>(args_.workspace) + 4 * (layout_.dy + layout_.dx) +
                  part * layout_.per_part(BATCH);
    Entry* entry = reinterpret_cast<Entry*>(bytes);
    float* t = reinterpret_cast<float*>(bytes + layout_.entries);
    int32_t* slot = reinterpret_cast<int32_t*>(t + layout_.terms * BATCH);
    const int64_t low = law_.blocks * part / args_.threads;
    const int64_t high = law_.blocks * (part + 1) / args_.threads;
    for (int tile = 0; tile < dx.count(); ++tile) {
      std::memset(dx.block_of(tile, low), 0, sizeof(float) * (high - low) * BLOCK * BATCH);
    }
    Walk walk(law_);
    for (const Strip& strip : strips_) {
      walk.walk(strip, low, high, entry, [&](const Piece<Entry>& piece) {
        const int64_t left = args_.columns - piece.block * BLOCK;
        const RingWindow<BLOCK> window(args_.bank_dtype, args_.ring, law_.slots, piece.base,
                                       static_cast<int>(left < BLOCK ? left : BLOCK));
        for (int tile = 0; tile < dx.count(); ++tile) {
          const float* rows = dy.block_of(tile, 0) + (strip.row + piece.row) * BATCH;
          for_terms<BATCH>(piece.entry, piece.count, piece.slots, piece.whole, rows, t, slot,
                           [&](const Terms& terms) {
                             add_input_grad<BLOCK, BATCH>(window, terms,
                                                          dx.block_of(tile, piece.block));
                           });
        }
      });
    }
    for (int64_t block = low; block < high; ++block) write(dx, block, m0);
  }

  void write(const DxTiles& dx, int64_t block, int64_t m0) const {
    const float scale = static_cast<float>(args_.scale);
    const int64_t column = block * BLOCK;
    const int64_t valid = std::min<int64_t>(BLOCK, args_.columns - column);
    for (int tile = 0; tile < dx.count(); ++tile) {
      const float* sums = dx.block_of(tile, block);
      for (int m = 0; m < dx.rows_of(tile); ++m) {
        const int64_t first = (m0 + int64_t{tile} * BATCH + m) * args_.columns + column;
        for (int64_t e = 0; e < valid; ++e) {
          const float value = sums[by_row(BATCH) ? m * BLOCK + e : e * BATCH + m];
          set_element(args_.dy_dtype, args_.dx, first + e, scale * value);
        }
      }
    }
  }

  const LayerLaw& law_;
  const LinearInputGradArgs& args_;
  std::vector<Strip> strips_;
  InputGradLayout<Walk> layout_;
};

template <class Walk>
Workspace workspace(const LayerLaw& law, const LinearInputGradArgs& args) {
  const InputGradLayout<Walk> layout(law, args.batch_tile, args.tiles);
  const int64_t activations = 4 * (layout.dy + layout.dx);
  return {activations + args.threads * layout.per_part(args.batch_tile), activations};
}

}  // namespace

Workspace linear_input_grad_workspace(const LayerLaw& law, const LinearInputGradArgs& args) {
  return law.window ? workspace<WindowWalk>(law, args) : workspace<RingWalk>(law, args);
}

void linear_input_grad(const LayerLaw& law, const LinearInputGradArgs& args) {
  run_instance<InputGrad>(law, args);
}

}  // namespace rpg::RPG_ISA
