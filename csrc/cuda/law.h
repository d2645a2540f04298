// The packing laws evaluated by a device.

#pragma once

#include <cstdint>

#include "law/window.h"

namespace rpg::cuda {

// slots [count] and words [count, words_of(law)] of positions (n, b) [count] of one band; device
// addresses. Throws std::runtime_error with CUDA's own words when the launch fails, and when this
// library was built without CUDA.
void law(const LayerLaw& law, int64_t band, const int64_t* n, const int64_t* b, int64_t count,
         int64_t* slots, int64_t* words, void* stream);

}  // namespace rpg::cuda
