// The packing laws evaluated by a device.

#pragma once

#include <cstdint>

#include "law/layer.h"

namespace rpg {

// Positions of one band; device addresses.
struct CudaLawArgs {
  int64_t band;
  const int64_t* n;  // [count], rows of the layer
  const int64_t* b;  // [count], blocks
  int64_t count;
  int64_t* slots;  // [count]
  int64_t* words;  // [count, words_of(law)], sign words
  void* stream;
};

// Both throw std::runtime_error with CUDA's own words when the launch fails, and the first when
// this library was built without CUDA.
namespace cuda {
void law(const LayerLaw&, const CudaLawArgs&);
}
namespace simt {
void law(const LayerLaw&, const CudaLawArgs&);
}

}  // namespace rpg
