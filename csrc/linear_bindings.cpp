// The methods of LayerLaw that run a linear layer on CPUs.

#include <pybind11/pybind11.h>

#include "bindings.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace rpg {
namespace {

Dtype checked_dtype(int dtype) {
  require(dtype >= 1 && dtype <= 3, "dtype: wanted 1 (float32), 2 (bfloat16) or 3 (float16)");
  return static_cast<Dtype>(dtype);
}

void check(const LayerLaw& law, int64_t batch, int64_t columns, int threads, int batch_tile,
           int tiles) {
  const int block = law.granularity;
  require(block == 32 || block == 64, "granularity: wanted blocks of 32 or 64 elements");
  require(law.reflect != Reflect::kElement, "reflect: wanted none or vector");
  require(law.window <= 1u << 15, "window: wanted at most 2^15 blocks");
  require(columns >= 1 && (columns - 1) / block + 1 == law.blocks, "columns: another K");
  require(batch >= 1 && batch <= INT64_MAX / 8 / law.rows / block, "batch: out of range");
  require(threads >= 1, "threads: wanted at least 1");
  require(batch_tile == 1 || batch_tile == 4 || batch_tile == 8 || batch_tile == 16,
          "batch_tile: wanted 1, 4, 8 or 16");
  require(tiles >= 1 && tiles <= 64, "tiles: wanted 1 to 64");
}

// (bytes in all, of them copies of activations).
using Bytes = std::pair<int64_t, int64_t>;

template <class Args, Workspace (*Kernels::*OF)(const LayerLaw&, const Args&)>
Bytes workspace(const LayerLaw& law, int64_t columns, int threads, int batch_tile, int tiles) {
  check(law, 1, columns, threads, batch_tile, tiles);
  Args args{};
  args.threads = threads, args.batch_tile = batch_tile, args.tiles = tiles;
  const Workspace of = (kernels().*OF)(law, args);
  return {of.bytes, of.activations};
}

void linear(const LayerLaw& law, uintptr_t ring, int bank_dtype, uintptr_t x, int x_dtype,
            uintptr_t bias, uintptr_t y, int64_t batch, int64_t columns, double scale, int threads,
            int batch_tile, int tiles, uintptr_t workspace) {
  check(law, batch, columns, threads, batch_tile, tiles);
  kernels().linear(
      law, {checked_dtype(bank_dtype), address<const void>(ring), checked_dtype(x_dtype),
            address<const void>(x), address<const float>(bias), address<void>(y), batch, columns,
            scale, threads, batch_tile, tiles, address<void>(workspace)});
}

void linear_input_grad(const LayerLaw& law, uintptr_t ring, int bank_dtype, uintptr_t dy,
                       int dy_dtype, uintptr_t dx, int64_t batch, int64_t columns, double scale,
                       int threads, int batch_tile, int tiles, uintptr_t workspace) {
  check(law, batch, columns, threads, batch_tile, tiles);
  kernels().linear_input_grad(
      law, {checked_dtype(bank_dtype), address<const void>(ring), checked_dtype(dy_dtype),
            address<const void>(dy), address<void>(dx), batch, columns, scale, threads, batch_tile,
            tiles, address<void>(workspace)});
}

void linear_bank_grad(const LayerLaw& law, uintptr_t dy, uintptr_t x, int dtype, uintptr_t dw,
                      int64_t batch, int64_t columns, double scale, int threads, int batch_tile,
                      int tiles, uintptr_t workspace) {
  check(law, batch, columns, threads, batch_tile, tiles);
  kernels().linear_bank_grad(law, {checked_dtype(dtype), address<const void>(dy),
                                   address<const void>(x), address<float>(dw), batch, columns,
                                   scale, threads, batch_tile, tiles, address<void>(workspace)});
}

}  // namespace

void bind_linear(py::class_<LayerLaw>& law) {
  using release = py::call_guard<py::gil_scoped_release>;
  const auto sizes = [&](const char* name, auto function) {
    law.def(name, function, release(), py::arg("columns"), py::arg("threads"),
            py::arg("batch_tile"), py::arg("tiles"));
  };
  sizes("linear_workspace", &workspace<LinearArgs, &Kernels::linear_workspace>);
  sizes("linear_input_grad_workspace",
        &workspace<LinearInputGradArgs, &Kernels::linear_input_grad_workspace>);
  sizes("linear_bank_grad_workspace",
        &workspace<LinearBankGradArgs, &Kernels::linear_bank_grad_workspace>);
  law.def("linear", &linear, release(), py::arg("ring"), py::arg("bank_dtype"), py::arg("x"),
          py::arg("x_dtype"), py::arg("bias"), py::arg("y"), py::arg("batch"), py::arg("columns"),
          py::arg("scale"), py::arg("threads"), py::arg("batch_tile"), py::arg("tiles"),
          py::arg("workspace"));
  law.def("linear_input_grad", &linear_input_grad, release(), py::arg("ring"),
          py::arg("bank_dtype"), py::arg("dy"), py::arg("dy_dtype"), py::arg("dx"),
          py::arg("batch"), py::arg("columns"), py::arg("scale"), py::arg("threads"),
          py::arg("batch_tile"), py::arg("tiles"), py::arg("workspace"));
  law.def("linear_bank_grad", &linear_bank_grad, release(), py::arg("dy"), py::arg("x"),
          py::arg("dtype"), py::arg("dw"), py::arg("batch"), py::arg("columns"), py::arg("scale"),
          py::arg("threads"), py::arg("batch_tile"), py::arg("tiles"), py::arg("workspace"));
}

}  // namespace rpg
