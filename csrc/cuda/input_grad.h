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
  int terms_per_lap;  // P has room for so many terms in each lap; in fp32: T has so many in all.
  int plane;          // P has room for so many terms in all, for each 8 rows of dy.
  int terms, dy_at, entry, flag, sums, last;  // as in InputGradPlan
};

// Where P or T (`terms`) and what goes with it begin in shared memory, in bytes, and how large P or
// T is.
struct InputGradPlan {
  StageLayout layout;
  int terms_per_lap, plane;
  int terms, dy_at, entry, flag, sums, last, bytes;
};

// Sums of parts: [part, m, element], two rows of which are on different banks where 4 lanes write.
constexpr int kSumPitch = 64 + 4;

}  // namespace rpg::RPG_DEVICE
