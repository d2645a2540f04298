// Products of int8 by AMX, written out, so that they take no flag with which the rest would need
// such a processor too. A thread has 8 tiles, which are
//
//   A  0           16 slots x up to 64 codes, as the bank has them
//   C  1, 2, 3     16 slots x up to 16 lanes of x, int32
//   B  4 to 7      up to 16 words of 4 codes x up to 16 lanes of x
//
// One instruction multiplies whole tiles, C += A · B, in 16 cycles.

#pragma once

#include "cpu/isa.h"
#include "cpu/pairs.h"

// Compilers whose assemblers know the instructions, on systems that are asked for tiles as Linux
// is.
#if defined(RPG_DOT_PRODUCTS) && defined(__linux__)
#define RPG_INT8_TILES
#endif

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

#if defined(RPG_INT8_TILES)

constexpr int kTileRows = 16, kTileLanes = 16, kTileBytes = 64, kFirstB = 4, kTilesOfB = 4;

template <int TILE>
inline void load_tile(const void* data, int64_t pitch) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(data), "r"(pitch), "i"(TILE) : "memory");
}
template <int TILE>
inline void store_tile(void* data, int64_t pitch) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)"
                   :
                   : "r"(data), "r"(pitch), "i"(TILE)
                   : "memory");
}
template <int TILE>
inline void clear_tile() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(TILE));
}
template <int C, int A, int B>
inline void multiply_tiles() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

// What the instruction that shapes tiles reads.
struct TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// Shapes the tiles of this thread, for blocks of `bytes` codes and so many lanes, as long as it
// lives; then they are as they were shaped before.
class ShapedTiles {
 public:
  ShapedTiles(int bytes, int lanes) {
    __asm__ volatile("sttilecfg %0" : "=m"(earlier_));
    TileShapes shapes{};
    shapes.palette = 1;
    const int lane_bytes = 4 * (lanes < kTileLanes ? lanes : kTileLanes);
    for (int i = 0; i < 8; ++i) {
      const bool a = i == 0, b = i >= kFirstB;
      shapes.row_bytes[i] = static_cast<uint16_t>(a ? bytes : lane_bytes);
      shapes.rows[i] = static_cast<uint8_t>(b ? bytes / 4 : kTileRows);
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
  }
  ~ShapedTiles() {
    if (earlier_.palette) {
      __asm__ volatile("ldtilecfg %0" : : "m"(earlier_));
    } else {
      __asm__ volatile("tilerelease");
    }
  }
  ShapedTiles(const ShapedTiles&) = delete;
  ShapedTiles& operator=(const ShapedTiles&) = delete;

 private:
  TileShapes earlier_;
};

// The tiles of B, [STEPS, NB], from words [up to 16 STEPS, lanes], `pitch` bytes apart.
template <int NB, int STEPS>
inline void load_tiles_of_b(const uint32_t* words, int64_t pitch) {
  const uint32_t* second = words + kTileRows * pitch / 4;
  load_tile<kFirstB>(words, pitch);
  if constexpr (NB > 1) load_tile<kFirstB + 1>(words + kTileLanes, pitch);
  if constexpr (NB > 2) load_tile<kFirstB + 2>(words + 2 * kTileLanes, pitch);
  if constexpr (NB > 2) load_tile<kFirstB + 3>(words + 3 * kTileLanes, pitch);
  if constexpr (STEPS > 1) load_tile<kFirstB + NB>(second, pitch);
  if constexpr (STEPS > 1 && NB > 1) load_tile<kFirstB + NB + 1>(second + kTileLanes, pitch);
}

// out [16, lanes] = A · B of one step.
template <int C, int B>
inline void multiply_tile(int32_t* out, int64_t pitch) {
  clear_tile<C>();
  multiply_tiles<C, 0, B>();
  store_tile<C>(out, pitch);
}

// out [16, NB · lanes] = 16 slots, `stride` bytes apart, times the tiles of B, [STEPS, NB]. Rows of
// out are `pitch` bytes apart.
template <int NB, int STEPS>
inline void multiply_slots(const int8_t* slots, int64_t stride, int32_t* out, int64_t pitch) {
  static_assert((NB == 1 || NB == 2 || NB == 4) && NB * STEPS <= kTilesOfB, "more than B has");
  load_tile<0>(slots, stride);
  if constexpr (STEPS == 1) {
    multiply_tile<1, kFirstB>(out, pitch);
    if constexpr (NB > 1) multiply_tile<2, kFirstB + 1>(out + kTileLanes, pitch);
    if constexpr (NB > 2) {
      multiply_tile<3, kFirstB + 2>(out + 2 * kTileLanes, pitch);
      multiply_tile<1, kFirstB + 3>(out + 3 * kTileLanes, pitch);
    }
  } else {
    clear_tile<1>(), clear_tile<2>();
    multiply_tiles<1, 0, kFirstB>();
    if constexpr (NB > 1) multiply_tiles<2, 0, kFirstB + 1>();
    load_tile<0>(slots + kTileBytes, stride);
    multiply_tiles<1, 0, kFirstB + NB>();
    if constexpr (NB > 1) multiply_tiles<2, 0, kFirstB + NB + 1>();
    store_tile<1>(out, pitch);
    if constexpr (NB > 1) store_tile<2>(out + kTileLanes, pitch);
  }
}

#endif

}  // namespace
}  // namespace rpg
