// slot(n, b) and sign words of a list of positions: how a device shows that it evaluates the laws
// as everybody else does.
//
// One position per thread, CTAs of 256 threads, no shared memory. Per position: 16 bytes read,
// 8 + 8 words written; 8 instructions per Feistel round and about 30 more, by law 3 besides 16
// rounds of 19. The band's law travels as a kernel argument, 500 bytes of constant memory by law 1
// and 750 by law 3.

#include <stdexcept>

#include "cuda/device.h"
#include "cuda/law.h"
#include "law/positions.h"

namespace rpg::RPG_DEVICE {

namespace {

constexpr int kThreads = 256;

RPG_FUNCTION uint32_t position(const BandLaw&, int64_t n, int64_t b, int64_t blocks) {
  return static_cast<uint32_t>(n * blocks + b);
}

RPG_FUNCTION uint32_t position(const UnitBand& law, int64_t n, int64_t b, int64_t) {
  return position_in_units(law, static_cast<uint32_t>(n), static_cast<uint32_t>(b));
}

template <class Band>
struct LawKernelArgs {
  Band law;           // of the band that all positions lie in
  int64_t first_row;  // of the band
  int64_t blocks;     // per row
  const int64_t* n;   // [count]
  const int64_t* b;   // [count]
  int64_t count;
  int64_t* slots;  // [count]
  int64_t* words;  // [count, words_per_block]
  int words_per_block;
};

template <class Band>
RPG_KERNEL(kThreads, 1)
law_kernel(RPG_ARGS LawKernelArgs<Band> args) {
  const int64_t i = int64_t{cta_x()} * kThreads + thread();
  if (i >= args.count) return;
  uint32_t q[1] = {position(args.law, args.n[i] - args.first_row, args.b[i], args.blocks)};
  for (int w = 0; w < args.words_per_block; ++w) {
    uint32_t word[1];
    sign_words_of(args.law, w, q, word);
    args.words[i * args.words_per_block + w] = word[0];
  }
  slots_of(args.law, q);
  args.slots[i] = q[0];
}

template <class Band>
void run(const LayerLaw& law, const Band& band, const CudaLawArgs& args) {
  const int64_t grid = (args.count + kThreads - 1) / kThreads;
  if (grid > INT32_MAX) throw std::runtime_error("count: wanted at most 2^31 CTAs of 256");
  launch(law_kernel<Band>, {static_cast<int>(grid), 1, 1}, kThreads, 0, args.stream,
         LawKernelArgs<Band>{band, args.band * law.rows_per_band, law.blocks, args.n, args.b,
                             args.count, args.slots, args.words, words_of(law)});
}

}  // namespace

void law(const LayerLaw& law, const CudaLawArgs& args) {
  find_device();
  if (args.count < 1) return;
  if (law.taps) {
    run(law, make_unit_band(law, args.band), args);
  } else {
    run(law, make_band_law(law, args.band), args);
  }
}

}  // namespace rpg::RPG_DEVICE
