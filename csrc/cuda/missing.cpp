// What stands in for the CUDA sources when they are not compiled.

#include <stdexcept>

#include "law.h"

namespace rpg::cuda {

void law(const LayerLaw&, int64_t, const int64_t*, const int64_t*, int64_t, int64_t*, int64_t*,
         void*) {
  throw std::runtime_error(
      "rpg_kernels was built without CUDA kernels; `rpg-kernels doctor` says why");
}

}  // namespace rpg::cuda
