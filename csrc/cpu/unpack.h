// What the kernels that unpack and pack are given.

#pragma once

#include <cstdint>

#include "cpu/region.h"
#include "cpu/stored.h"
#include "law/number.h"

namespace rpg {

// Ŵ's blocks [positions, block], or what a cut leaves of them, = scale · G · ring [slots, block].
struct UnpackArgs {
  Region region;
  Cut cut;
  Dtype dtype;  // of out
  Bank bank;    // the ring: of that dtype, or codes
  void* out;
  double scale;
  int threads;
};

// grad [slots, block] += scale · Gᵀ · dense [positions, block], position by position; zeros where
// the cut leaves nothing.
struct PackArgs {
  Region region;
  Cut cut;
  Dtype dtype;  // of dense
  const void* dense;
  void* grad;  // float64 for float64, otherwise float32
  double scale;
  int threads;
  uint32_t* workspace;  // [workspace_entries], 1 + words entries per position; for threads > 1
  int64_t workspace_entries;
};

}  // namespace rpg
