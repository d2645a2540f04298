// The laws on lists of positions: slots, sign words, and the bare permutation (of the window law:
// of units) and its inverse.
//
// A list is split evenly over threads and evaluated kLanes positions at a time, all of one band.

#include "cpu/kernels.h"

namespace rpg::RPG_ISA {

namespace {

constexpr int kLanes = 64;

// Calls evaluate(band_law, q, first, size) for positions first ... first + size - 1 of the list,
// which are of one band.
template <class Evaluate>
void by_band(const LayerLaw& law, const int64_t* n, const int64_t* b, int64_t count, int threads,
             const Evaluate& evaluate) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int part = 0; part < threads; ++part) {
    int64_t first = count * part / threads;
    const int64_t end = count * (part + 1) / threads;
    WindowBand band_law{};
    for (int64_t band = -1; first < end;) {
      const int64_t next = n[first] / law.rows_per_band;
      if (next != band) band_law = make_any_band(law, band = next);
      uint32_t q[kLanes] = {};
      int size = 0;
      for (; size < kLanes && first + size < end; ++size) {
        const int64_t row = n[first + size] - band * law.rows_per_band;
        if (row < 0 || row >= law.rows_per_band) break;
        const int64_t block = b[first + size];
        q[size] = law.window
                      ? order(band_law, static_cast<uint32_t>(row), static_cast<uint32_t>(block))
                      : static_cast<uint32_t>(row * law.blocks + block);
      }
      evaluate(band_law, q, first, size);
      first += size;
    }
  }
}

}  // namespace

void slots(const LayerLaw& law, const int64_t* n, const int64_t* b, int64_t count, int64_t* out,
           int threads) {
  by_band(law, n, b, count, threads,
          [&](const WindowBand& band_law, uint32_t (&q)[kLanes], int64_t first, int size) {
            any_slots_of(band_law, q);
            for (int l = 0; l < size; ++l) out[first + l] = q[l];
          });
}

void sign_words(const LayerLaw& law, const int64_t* n, const int64_t* b, int64_t count,
                int64_t* out, int threads) {
  const int words = words_of(law);
  by_band(law, n, b, count, threads,
          [&](const WindowBand& band_law, uint32_t (&q)[kLanes], int64_t first, int size) {
            for (int w = 0; w < words; ++w) {
              uint32_t word[kLanes];
              any_sign_words_of(band_law, w, q, word);
              for (int l = 0; l < size; ++l) out[(first + l) * words + w] = word[l];
            }
          });
}

void permutation(const LayerLaw& law, int64_t band, bool inverse, const int64_t* q, int64_t count,
                 int64_t* out, int threads) {
  const Permutation p = make_any_band(law, band).permutation;
  const int64_t groups = (count + kLanes - 1) / kLanes;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = group * kLanes;
    const int size = static_cast<int>(count - first < kLanes ? count - first : kLanes);
    uint32_t lanes[kLanes] = {};
    for (int l = 0; l < size; ++l) lanes[l] = static_cast<uint32_t>(q[first + l]);
    if (inverse) {
      unpermute(p, lanes);
    } else {
      permute(p, lanes);
    }
    for (int l = 0; l < size; ++l) out[first + l] = lanes[l];
  }
}

}  // namespace rpg::RPG_ISA
