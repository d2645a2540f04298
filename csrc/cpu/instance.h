// Which instance of a kernel runs a call: each is compiled for a size of blocks, rows of the batch
// at a time, and a law.

#pragma once

#include "cpu/walk.h"

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

template <template <int BLOCK, int BATCH, class Walk> class Kernel, int BLOCK, class Walk,
          class Args>
void run_batch(const LayerLaw& law, const Args& args) {
  switch (args.batch_tile) {
    case 1: return Kernel<BLOCK, 1, Walk>(law, args).run();
    case 4: return Kernel<BLOCK, 4, Walk>(law, args).run();
    case 8: return Kernel<BLOCK, 8, Walk>(law, args).run();
    default: return Kernel<BLOCK, 16, Walk>(law, args).run();
  }
}

template <template <int BLOCK, int BATCH, class Walk> class Kernel, class Args>
void run_instance(const LayerLaw& law, const Args& args) {
  if (law.granularity == 32) {
    if (law.window) return run_batch<Kernel, 32, WindowWalk>(law, args);
    return run_batch<Kernel, 32, RingWalk>(law, args);
  }
  if (law.window) return run_batch<Kernel, 64, WindowWalk>(law, args);
  run_batch<Kernel, 64, RingWalk>(law, args);
}

}  // namespace
}  // namespace rpg
