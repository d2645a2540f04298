// The methods of LayerLaw that run linear layers of int8 banks with rows of x rounded to int8.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

#include "bindings/bank.h"
#include "bindings/module.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace rpg {
namespace {

constexpr int kFewLanes = 4;  // lanes up to which the kernel for few rows of x is meant
constexpr int kLeastLanes = 16, kMostLanes = 64;

Int8LinearArgs int8_args(const LayerLaw& law, int64_t batch, int64_t columns, int threads,
                         int lanes, int products) {
  const int block = law.granularity;
  require(law.taps == 1 && bands_of(law) == 1 && law.run_blocks == law.blocks,
          "law: wanted units of one tap of a matrix, in one band");
  require(block >= 16 && block <= 128, "granularity: wanted blocks of 16 to 128 elements");
  require(law.reflect != Reflect::kElement, "reflect: wanted none or vector");
  require(batch >= 1 && batch <= INT64_MAX / 8 / law.rows / block, "batch: out of range");
  require(columns >= 1 && (columns - 1) / block + 1 == law.blocks, "columns: another K");
  require(threads >= 1, "threads: wanted at least 1");
  const bool fits_few = lanes >= 1 && lanes <= kFewLanes && batch <= lanes && block % 32 == 0;
  require(!(lanes & (lanes - 1)) && (fits_few || (lanes >= kLeastLanes && lanes <= kMostLanes)),
          "lanes: wanted 16, 32 or 64, or up to 4 for no larger a batch and blocks of 32 or more");
  require(products >= 0 && products <= static_cast<int>(best_int8_products()),
          "products: wanted a way to multiply that the processor has");
  Int8LinearArgs args{};
  args.batch = batch, args.columns = columns, args.threads = threads, args.lanes = lanes;
  args.products = static_cast<Int8Products>(products);
  return args;
}

// (bytes in all, of them copies of activations).
std::pair<int64_t, int64_t> workspace_bytes(const LayerLaw& law, int64_t batch, int64_t columns,
                                            int threads, int lanes, int products) {
  const Int8LinearArgs args = int8_args(law, batch, columns, threads, lanes, products);
  const Workspace size = lanes > kFewLanes ? kernels().unit_linear_int8_workspace(law, args)
                                           : kernels().unit_linear_int8_few_workspace(law, args);
  return {size.bytes, size.activations};
}

void linear(const LayerLaw& law, const GivenBank& bank, uintptr_t x, int x_dtype, uintptr_t bias,
            uintptr_t y, int64_t batch, int64_t columns, double scale, int threads, int lanes,
            uintptr_t workspace, int products) {
  Int8LinearArgs args = int8_args(law, batch, columns, threads, lanes, products);
  args.bank = checked_bank(law, bank);
  require(args.bank.dtype == Dtype::kInt8, "bank: wanted int8 with scales");
  require(x_dtype >= 1 && x_dtype <= 3, "x_dtype: wanted 1 (float32), 2 (bfloat16) or 3 (float16)");
  args.x_dtype = static_cast<Dtype>(x_dtype), args.x = address<const void>(x);
  args.bias = address<const float>(bias), args.y = address<void>(y);
  args.scale = scale, args.workspace = address<void>(workspace);
  (lanes > kFewLanes ? kernels().unit_linear_int8 : kernels().unit_linear_int8_few)(law, args);
}

}  // namespace

void bind_int8(py::class_<LayerLaw>& law) {
  using Release = py::call_guard<py::gil_scoped_release>;
  law.def("unit_linear_int8_workspace", &workspace_bytes, Release(), py::arg("batch"),
          py::arg("columns"), py::arg("threads"), py::arg("lanes"), py::arg("products"));
  law.def("unit_linear_int8", &linear, Release(), py::arg("bank"), py::arg("x"), py::arg("x_dtype"),
          py::arg("bias"), py::arg("y"), py::arg("batch"), py::arg("columns"), py::arg("scale"),
          py::arg("threads"), py::arg("lanes"), py::arg("workspace"), py::arg("products"));
}

}  // namespace rpg
