// S [rows, L] = scale of the slot · (codes [rows, block] · x_b [block, L]): products by slot of a
// window of int8 codes and of rows of x, rounded to int8.
//
// A sum of 128 products is a whole number below 2^21, which int32 and fp32 hold exactly: the three
// ways to multiply give the same bits.
//
//   tiles   16 slots x 16 lanes x 64 steps an instruction (int8_tiles.h); 16 slots of the bank are
//           a tile as they lie there. S is read once more, to become fp32.
//   dots    an instruction multiplies a word of 4 codes with 16 lanes of such words of x. It takes
//           unsigned numbers times signed ones: codes become code + 128 by a change of their top
//           bit, so sums begin with -128 Σ x_b, the same for all slots.
//   plain   codes and x as fp32, by the product of all other kernels.

#pragma once

#include "cpu/int8_codes.h"
#include "cpu/int8_tiles.h"
#include "cpu/product.h"

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

// s [rows, lanes] *= scale [rows].
inline void scale_rows(int64_t rows, int64_t lanes, const float* scale, float* s) {
  for (int64_t r = 0; r < rows; ++r, s += lanes) {
    const Floats<kVector> factor = splat<kVector>(scale[r]);
    for (int64_t i = 0; i < lanes; i += kVector) {
      store<kVector>(s + i, load<kVector>(s + i) * factor);
    }
  }
}

#if defined(RPG_DOT_PRODUCTS)

typedef Pairs<kVector> Words;  // of 4 bytes, or sums of their products

// sum += bytes 0 to 255 times bytes -128 to 127.
inline void add_bytes(Words& sum, const Words& not_signed, const Words& with_sign) {
  Words total = sum;  // as in add_pairs
  __asm__("vpdpbusd %2, %1, %0" : "+v"(total) : "v"(not_signed), "v"(with_sign));
  sum = total;
}

constexpr int32_t kTopBits = static_cast<int32_t>(0x80808080);

// s [MR, NV vectors] of a panel of S. `first` is what sums begin with, -128 Σ x_b.
template <int MR, int NV>
inline void multiply_words(const int8_t* codes, int64_t block, const Words (&first)[NV],
                           const uint32_t* x, int64_t lanes, const float* scale, float* s) {
  Words sum[MR][NV];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[r][v] = first[v];
  }
  for (int64_t k = 0; k < block; k += 4, x += lanes) {
    Words xk[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) xk[v] = load_words<kVector>(x + v * kVector);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      int32_t word;
      std::memcpy(&word, codes + r * block + k, sizeof word);
      const Words element = (word - Words{}) ^ kTopBits;
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) add_bytes(sum[r][v], element, xk[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    const Floats<kVector> factor = splat<kVector>(scale[r]);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      store<kVector>(s + r * lanes + v * kVector,
                     __builtin_convertvector(sum[r][v], Floats<kVector>) * factor);
    }
  }
}

// The same of all rows; MR slots and NV vectors of lanes have their sums in registers.
template <int MR, int NV>
inline void multiply_panel_of_words(const int8_t* codes, int64_t rows, int64_t block,
                                    const uint32_t* x, int64_t lanes, const float* scale,
                                    float* s) {
  Words first[NV] = {};
  for (int64_t k = 0; k < block / 4; ++k) {
    for (int v = 0; v < NV; ++v) {
      add_bytes(first[v], kTopBits - Words{}, load_words<kVector>(x + k * lanes + v * kVector));
    }
  }
  for (int v = 0; v < NV; ++v) first[v] = -first[v];
  for (int64_t r = 0; r < rows; r += MR) {
    multiply_words<MR, NV>(codes + r * block, block, first, x, lanes, scale + r, s + r * lanes);
  }
}

// By dots; rows are a multiple of 8, x words [block / 4, lanes].
inline void multiply_dots(const int8_t* codes, int64_t rows, int64_t block, const uint32_t* x,
                          int64_t lanes, const float* scale, float* s) {
  for (int64_t j = 0; j < lanes; j += 4 * kVector) {
    switch ((lanes - j) / kVector) {
      case 1: multiply_panel_of_words<8, 1>(codes, rows, block, x + j, lanes, scale, s + j); break;
      case 2: multiply_panel_of_words<8, 2>(codes, rows, block, x + j, lanes, scale, s + j); break;
      default: multiply_panel_of_words<4, 4>(codes, rows, block, x + j, lanes, scale, s + j);
    }
  }
}

#endif

#if defined(RPG_INT8_TILES)

// s [16, lanes] = sums [16, NB · 16], times the scale of each row.
template <int NB>
inline void scale_sums(const int32_t* sums, const float* scale, float* s, int64_t lanes) {
  for (int r = 0; r < kTileRows; ++r) {
    const Floats<kVector> factor = splat<kVector>(scale[r]);
#pragma GCC unroll 4
    for (int v = 0; v < NB; ++v) {
      const Words sum = load_words<kVector>(sums + (r * NB + v) * kVector);
      store<kVector>(s + r * lanes + v * kVector,
                     __builtin_convertvector(sum, Floats<kVector>) * factor);
    }
  }
}

// Sums of 16 slots are scaled when those of the next 16 are on their way. `soon` is memory that is
// read after this product.
template <int NB, int STEPS>
inline void multiply_panel_of_tiles(const int8_t* codes, int64_t rows, int64_t block,
                                    const uint32_t* x, int64_t lanes, const float* scale, float* s,
                                    const char* soon) {
  alignas(64) int32_t sums[2][kTileRows * NB * kTileLanes];
  constexpr int64_t kPitch = sizeof(int32_t) * NB * kTileLanes;
  load_tiles_of_b<NB, STEPS>(x, static_cast<int64_t>(sizeof(uint32_t)) * lanes);
  for (int64_t r = 0; r < rows; r += kTileRows) {
    int32_t* out = sums[r / kTileRows % 2];
    multiply_slots<NB, STEPS>(codes + r * block, block, out, kPitch);
    for (int64_t i = 0; soon && i < kTileRows * block; i += 64) {
      __builtin_prefetch(soon + r * block + i, 0, 2);
    }
    if (r) {
      scale_sums<NB>(sums[(r / kTileRows + 1) % 2], scale + r - kTileRows,
                     s + (r - kTileRows) * lanes, lanes);
    }
  }
  scale_sums<NB>(sums[(rows / kTileRows + 1) % 2], scale + rows - kTileRows,
                 s + (rows - kTileRows) * lanes, lanes);
}

// By tiles, which are shaped; rows are a multiple of 16, x words [block / 4, lanes].
inline void multiply_by_tiles(const int8_t* codes, int64_t rows, int64_t block, const uint32_t* x,
                              int64_t lanes, const float* scale, float* s, const void* next) {
  const char* soon = static_cast<const char*>(next);
  const int64_t panel = (block > kTileBytes ? 2 : 4) * kTileLanes;
  for (int64_t j = 0; j < lanes; j += panel, soon = nullptr) {
    const int64_t tiles = std::min(lanes - j, panel) / kTileLanes;
    if (block > kTileBytes) {
      if (tiles == 1) {
        multiply_panel_of_tiles<1, 2>(codes, rows, block, x + j, lanes, scale, s + j, soon);
      } else {
        multiply_panel_of_tiles<2, 2>(codes, rows, block, x + j, lanes, scale, s + j, soon);
      }
    } else if (tiles == 1) {
      multiply_panel_of_tiles<1, 1>(codes, rows, block, x + j, lanes, scale, s + j, soon);
    } else if (tiles == 2) {
      multiply_panel_of_tiles<2, 1>(codes, rows, block, x + j, lanes, scale, s + j, soon);
    } else {
      multiply_panel_of_tiles<4, 1>(codes, rows, block, x + j, lanes, scale, s + j, soon);
    }
  }
}

#endif

}  // namespace
}  // namespace rpg
