// The functions of a device's submodule: `cuda`, and `simt` in development builds, which is given
// the same arguments; there `stream` is the order in which threads run.

#pragma once

#include <pybind11/pybind11.h>

#include "bindings/module.h"
#include "cuda/law.h"
#include "cuda/linear_grads.h"
#include "cuda/unpack.h"

namespace py = pybind11;

namespace rpg {
namespace {

constexpr int64_t kInt32 = INT32_MAX;

void check_blocks(const LayerLaw& law) {
  const int block = law.granularity;
  require(law.taps <= 1 && (!law.taps || law.run_blocks == law.blocks),
          "taps, run_blocks: wanted a matrix, not a convolution");
  require(block == 32 || block == 64, "granularity: wanted blocks of 32 or 64 elements");
}

void check_law(const LayerLaw& law) {
  check_blocks(law);
  require(bands_of(law) == 1, "rows: wanted a layer of at most 2^31 blocks");
  require(law.rows * law.blocks <= kInt32 && law.blocks * law.granularity <= kInt32,
          "rows: wanted fewer than 2^31 blocks, and elements of a row");
}

Dtype checked_dtype(int dtype) {
  require(dtype >= 1 && dtype <= 3, "dtype: wanted 1 (float32), 2 (bfloat16) or 3 (float16)");
  return static_cast<Dtype>(dtype);
}

void check_columns(const LayerLaw& law, int64_t columns) {
  require(columns >= 1 && (columns - 1) / law.granularity + 1 == law.blocks, "columns: another K");
}

void check_plan(const Plan& plan, int64_t batch) {
  require(batch >= 1 && plan.batch_tiles == (batch + plan.batch_tile - 1) / plan.batch_tile,
          "batch: another than the plan's");
}

using PlanOf = Plan (*)(const LayerLaw&, Dtype, int64_t, int64_t, const Device&);

template <PlanOf PLAN>
Plan plan(const LayerLaw& law, int dtype, int64_t batch, int64_t columns, int sms,
          int shared_bytes) {
  check_law(law);
  check_columns(law, columns);
  require(batch >= 1 && batch <= kInt32 / 64, "batch: wanted 1 to 2^25");
  require(sms >= 1 && shared_bytes >= 1, "sms, shared_bytes: wanted at least 1");
  return PLAN(law, checked_dtype(dtype), batch, columns, {sms, shared_bytes});
}

using LinearOf = void (*)(const LayerLaw&, const Plan&, const CudaLinearArgs&);

template <LinearOf LINEAR>
void linear(const LayerLaw& law, const Plan& plan, int dtype, uintptr_t ring, uintptr_t x,
            uintptr_t bias, uintptr_t y, int64_t batch, int64_t columns, double scale,
            uintptr_t workspace, uintptr_t counters, uintptr_t stream) {
  check_law(law);
  check_columns(law, columns);
  require(ring % 16 == 0, "ring: wanted an address that is a multiple of 16");
  check_plan(plan, batch);
  LINEAR(law, plan,
         {checked_dtype(dtype), address<const void>(ring), address<const void>(x),
          address<const float>(bias), address<void>(y), batch, columns, scale,
          address<float>(workspace), address<unsigned>(counters), address<void>(stream)});
}

using InputGradOf = void (*)(const LayerLaw&, const Plan&, const CudaLinearInputGradArgs&);

template <InputGradOf INPUT_GRAD>
void linear_input_grad(const LayerLaw& law, const Plan& plan, int dtype, uintptr_t ring,
                       uintptr_t dy, uintptr_t dx, int64_t batch, int64_t columns, double scale,
                       uintptr_t workspace, uintptr_t counters, uintptr_t stream) {
  check_law(law);
  check_columns(law, columns);
  check_plan(plan, batch);
  require(ring % 16 == 0, "ring: wanted an address that is a multiple of 16");
  INPUT_GRAD(law, plan,
             {checked_dtype(dtype), address<const void>(ring), address<const void>(dy),
              address<void>(dx), batch, columns, scale, address<float>(workspace),
              address<unsigned>(counters), address<void>(stream)});
}

using BankGradOf = void (*)(const LayerLaw&, const Plan&, const CudaLinearBankGradArgs&);

template <BankGradOf BANK_GRAD>
void linear_bank_grad(const LayerLaw& law, const Plan& plan, int dtype, uintptr_t dy, uintptr_t x,
                      uintptr_t dw, int64_t batch, int64_t columns, double scale,
                      uintptr_t workspace, uintptr_t counters, uintptr_t stream) {
  check_law(law);
  check_columns(law, columns);
  check_plan(plan, batch);
  BANK_GRAD(law, plan,
            {checked_dtype(dtype), address<const void>(dy), address<const void>(x),
             address<float>(dw), batch, columns, scale, address<float>(workspace),
             address<unsigned>(counters), address<void>(stream)});
}

template <void (*UNPACK)(const LayerLaw&, const CudaUnpackArgs&)>
void unpack(const LayerLaw& law, int dtype, uintptr_t ring, uintptr_t out, int64_t columns,
            double scale, uintptr_t stream) {
  check_blocks(law);
  check_columns(law, columns);
  require(ring % 16 == 0, "ring: wanted an address that is a multiple of 16");
  UNPACK(law, {checked_dtype(dtype), address<const void>(ring), address<void>(out), columns, scale,
               address<void>(stream)});
}

template <void (*PACK)(const LayerLaw&, const CudaPackArgs&)>
void pack(const LayerLaw& law, int dtype, uintptr_t dense, uintptr_t grad, int64_t columns,
          double scale, uintptr_t stream) {
  check_blocks(law);
  check_columns(law, columns);
  PACK(law, {checked_dtype(dtype), address<const void>(dense), address<float>(grad), columns, scale,
             address<void>(stream)});
}

template <void (*UNPACK)(const LayerLaw&, const CudaUnpackArgs&),
          void (*PACK)(const LayerLaw&, const CudaPackArgs&)>
void bind_unpack(py::module_& m) {
  m.def("unpack", &unpack<UNPACK>, py::call_guard<py::gil_scoped_release>(), py::arg("law"),
        py::arg("dtype"), py::arg("ring"), py::arg("out"), py::arg("columns"), py::arg("scale"),
        py::arg("stream"));
  m.def("pack", &pack<PACK>, py::call_guard<py::gil_scoped_release>(), py::arg("law"),
        py::arg("dtype"), py::arg("dense"), py::arg("grad"), py::arg("columns"), py::arg("scale"),
        py::arg("stream"));
}

// Evaluates positions of one band on the device of the stream; all are device addresses.
template <void (*LAW)(const LayerLaw&, const CudaLawArgs&)>
void law(const LayerLaw& law, int64_t band, uintptr_t n, uintptr_t b, int64_t count,
         uintptr_t slots, uintptr_t words, uintptr_t stream) {
  require(band >= 0 && band < bands_of(law), "band: outside the layer");
  LAW(law, {band, address<const int64_t>(n), address<const int64_t>(b), count,
            address<int64_t>(slots), address<int64_t>(words), address<void>(stream)});
}

template <void (*LAW)(const LayerLaw&, const CudaLawArgs&)>
void bind_law(py::module_& m) {
  m.def("law", &law<LAW>, py::arg("law"), py::arg("band"), py::arg("n"), py::arg("b"),
        py::arg("count"), py::arg("slots"), py::arg("words"), py::arg("stream"),
        "Slots and sign words of positions of one band, int64 numbers in the device's memory.");
}

template <PlanOf PLAN>
void bind_plan(py::module_& m, const char* name) {
  m.def(name, &plan<PLAN>, py::arg("law"), py::arg("dtype"), py::arg("batch"), py::arg("columns"),
        py::arg("sms"), py::arg("shared_bytes"));
}

template <LinearOf LINEAR, InputGradOf INPUT_GRAD, BankGradOf BANK_GRAD>
void bind(py::module_ m) {
  m.def("linear", &linear<LINEAR>, py::call_guard<py::gil_scoped_release>(), py::arg("law"),
        py::arg("plan"), py::arg("dtype"), py::arg("ring"), py::arg("x"), py::arg("bias"),
        py::arg("y"), py::arg("batch"), py::arg("columns"), py::arg("scale"), py::arg("workspace"),
        py::arg("counters"), py::arg("stream"));
  m.def("linear_input_grad", &linear_input_grad<INPUT_GRAD>,
        py::call_guard<py::gil_scoped_release>(), py::arg("law"), py::arg("plan"), py::arg("dtype"),
        py::arg("ring"), py::arg("dy"), py::arg("dx"), py::arg("batch"), py::arg("columns"),
        py::arg("scale"), py::arg("workspace"), py::arg("counters"), py::arg("stream"));
  m.def("linear_bank_grad", &linear_bank_grad<BANK_GRAD>, py::call_guard<py::gil_scoped_release>(),
        py::arg("law"), py::arg("plan"), py::arg("dtype"), py::arg("dy"), py::arg("x"),
        py::arg("dw"), py::arg("batch"), py::arg("columns"), py::arg("scale"), py::arg("workspace"),
        py::arg("counters"), py::arg("stream"));
}

}  // namespace
}  // namespace rpg
