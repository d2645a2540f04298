// Which instance of a kernel runs a call: each is compiled for a size of blocks and for rows of the
// batch at a time.

#pragma once

#include "law/layer.h"

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

template <template <int BLOCK, int BATCH> class Kernel, int BLOCK, class Args>
void run_batch(const LayerLaw& law, const Args& args) {
  switch (args.batch_tile) {
    case 1: return Kernel<BLOCK, 1>(law, args).run();
    case 4: return Kernel<BLOCK, 4>(law, args).run();
    case 8: return Kernel<BLOCK, 8>(law, args).run();
    default: return Kernel<BLOCK, 16>(law, args).run();
  }
}

template <template <int BLOCK, int BATCH> class Kernel, class Args>
void run_instance(const LayerLaw& law, const Args& args) {
  if (law.granularity == 32) return run_batch<Kernel, 32>(law, args);
  run_batch<Kernel, 64>(law, args);
}

}  // namespace
}  // namespace rpg
