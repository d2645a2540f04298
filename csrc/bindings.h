// Parts of the Python module that have files of their own.

#pragma once

#include <pybind11/pybind11.h>

#include "law.h"

namespace rpg {

void bind_linear(pybind11::class_<LayerLaw>& law);

}  // namespace rpg
