// What the files of the Python module share.

#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>

#include "law/layer.h"

namespace rpg {

template <class T>
T* address(uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

inline void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

// Adds the methods that run linear layers and convolutions, and the selections that they take.
void bind_linear(pybind11::module_& m, pybind11::class_<LayerLaw>& law);

// Adds those that run linear layers in int8.
void bind_int8(pybind11::class_<LayerLaw>& law);

// Adds the submodule of the CUDA kernels.
void bind_cuda(pybind11::module_& m);

// Adds what only development builds have, after bind_cuda.
void bind_development(pybind11::module_& m);

}  // namespace rpg
