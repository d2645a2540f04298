// What the two ways of linear_input_grad.cu share: arguments, and where things are in shared
// memory.

#pragma once

#include "cuda/columns.h"
#include "cuda/linear_grads.h"

namespace rpg::RPG_DEVICE {

// Where P or T (`terms`) and what goes with it begin in shared memory, in bytes, and how large P or
// T is.
struct InputGradLayout {
  StageLayout stages;
  int terms_per_lap;  // P has room for so many terms in each lap; in fp32: T has so many in all.
  int plane;          // P has room for so many terms in all, for each 8 rows of dy.
  int terms, dy, entry, flag, sums, last, bytes;
};

struct InputGradKernelArgs {
  Layer layer;
  Plan plan;
  InputGradLayout layout;
  CudaLinearInputGradArgs call;
};

// Sums of parts: [part, m, element], two rows of which are on different banks where 4 lanes write.
constexpr int kSumPitch = 64 + 4;

}  // namespace rpg::RPG_DEVICE
