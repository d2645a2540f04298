// What the CUDA kernels that unpack and pack whole layers are given.

#pragma once

#include <cstdint>

#include "law/layer.h"
#include "law/number.h"

namespace rpg {

// out [N, K] = scale · G ring; dtype of both.
struct CudaUnpackArgs {
  Dtype dtype;
  const void* ring;  // [slots, block]
  void* out;         // [N, K]
  int64_t columns;   // K
  double scale;
  void* stream;
};

// grad [slots, block] = scale · Gᵀ dense [N, K].
struct CudaPackArgs {
  Dtype dtype;        // of dense
  const void* dense;  // [N, K]
  float* grad;        // [slots, block], all of it written
  int64_t columns;    // K
  double scale;
  void* stream;
};

namespace cuda {
void unpack(const LayerLaw&, const CudaUnpackArgs&);
void pack(const LayerLaw&, const CudaPackArgs&);
}  // namespace cuda
namespace simt {
void unpack(const LayerLaw&, const CudaUnpackArgs&);
void pack(const LayerLaw&, const CudaPackArgs&);
}  // namespace simt

}  // namespace rpg
