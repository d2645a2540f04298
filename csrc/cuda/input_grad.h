// What the two ways of linear_input_grad.cu share: arguments, and where things are in shared
// memory.

#pragma once

#include "cuda/entries.h"
#include "cuda/plan.h"

namespace rpg::RPG_DEVICE {

struct InputGradKernelArgs {
  Layer layer;
  Tiling tiling;
  StageLayout layout;
  Bank bank;
  const void* dy;      // [batch, N]
  void* dx;            // [batch, K]
  float* partial;      // [tiles, batch, K]
  unsigned* counters;  // [batch tiles, splits]
  float scale;
  int batch;
  int splits;
  int lap_slots;  // A lap of P has so many slots; in fp32: the places of T, or rows.
  int plane;      // 8 rows of dy have so many slots in P.
  int terms, dy_at, entry, sums, last;  // Where they are in shared memory, as in InputGradPlan.
};

// Where things are in shared memory, in bytes, and how large T or P is.
struct InputGradPlan {
  StageLayout layout;
  int lap_slots, plane;
  int terms, dy, entry, sums, last, bytes;
};

// Rows of a tile of any kind, at most.
RPG_LAW int most_rows(const Tiling& tiling) {
  return tiling.rows > tiling.rest ? tiling.rows : tiling.rest;
}

// Sums of parts: [part, m, element], two rows of which are on different banks where 4 lanes write.
constexpr int kSumPitch = 64 + 4;

}  // namespace rpg::RPG_DEVICE
