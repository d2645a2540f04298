// The laws on lists of positions: slots, sign words, and the bare permutation (of the unit law: of
// columns) and its inverse.
//
// A list is split evenly over threads and evaluated kLanes positions at a time, all of one band.

#include "cpu/kernels.h"
#include "law/positions.h"

namespace rpg::RPG_ISA {

namespace {

constexpr int kLanes = 64;

// The position of row n of the band and block b, which the law's functions take.
uint32_t position_at(const LayerLaw& law, const BandLaw&, uint32_t n, uint32_t b) {
  return n * static_cast<uint32_t>(law.blocks) + b;
}
uint32_t position_at(const LayerLaw&, const UnitBand& band, uint32_t n, uint32_t b) {
  return position_in_units(band, n, b);
}

// Calls evaluate(band_law, p, first, size) for positions first ... first + size - 1 of the list,
// which are of one band.
template <class Evaluate>
void by_band(const LayerLaw& law, const int64_t* n, const int64_t* b, int64_t count, int threads,
             const Evaluate& evaluate) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int part = 0; part < threads; ++part) {
    int64_t first = count * part / threads;
    const int64_t end = count * (part + 1) / threads;
    AnyBand any_band{};
    for (int64_t band = -1; first < end;) {
      const int64_t next = n[first] / law.rows_per_band;
      if (next != band) any_band = make_any_band(law, band = next);
      with_band(law, any_band, [&](const auto& band_law) {
        uint32_t p[kLanes] = {};
        int size = 0;
        for (; size < kLanes && first + size < end; ++size) {
          const int64_t row = n[first + size] - band * law.rows_per_band;
          if (row < 0 || row >= law.rows_per_band) break;
          const int64_t block = b[first + size];
          p[size] =
              position_at(law, band_law, static_cast<uint32_t>(row), static_cast<uint32_t>(block));
        }
        evaluate(band_law, p, first, size);
        first += size;
      });
    }
  }
}

}  // namespace

void slots(const LayerLaw& law, const int64_t* n, const int64_t* b, int64_t count, int64_t* out,
           int threads) {
  by_band(law, n, b, count, threads,
          [&](const auto& band_law, uint32_t (&p)[kLanes], int64_t first, int size) {
            slots_of(band_law, p);
            for (int l = 0; l < size; ++l) out[first + l] = p[l];
          });
}

void sign_words(const LayerLaw& law, const int64_t* n, const int64_t* b, int64_t count,
                int64_t* out, int threads) {
  const int words = words_of(law);
  by_band(law, n, b, count, threads,
          [&](const auto& band_law, uint32_t (&p)[kLanes], int64_t first, int size) {
            for (int w = 0; w < words; ++w) {
              uint32_t word[kLanes];
              sign_words_of(band_law, w, p, word);
              for (int l = 0; l < size; ++l) out[(first + l) * words + w] = word[l];
            }
          });
}

void permutation(const LayerLaw& law, int64_t band, bool inverse, const int64_t* q, int64_t count,
                 int64_t* out, int threads) {
  Permutation p;
  with_band(law, make_any_band(law, band), [&](const auto& band_law) { p = band_law.permutation; });
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
