// The first steps of docs/ladder.md.

#pragma once

#include "law/layer.h"

namespace rpg {

// y [N] = scale · (G ring) x [K]; all bf16, blocks of 64.
struct LadderArgs {
  const void* ring;  // [slots, 64], aligned to 4 bytes
  const void* x;     // [K]
  void* y;           // [N]
  int64_t columns;   // K
  double scale;
  void* stream;
};

// step: 1, a thread for each row, or 2, a warp.
namespace cuda {
void ladder_linear(const LayerLaw&, int step, const LadderArgs&);
}
namespace simt {
void ladder_linear(const LayerLaw&, int step, const LadderArgs&);
}

}  // namespace rpg
