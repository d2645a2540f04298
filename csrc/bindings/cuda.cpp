// The submodule `cuda` of the Python module: the CUDA kernels on the current device.

#include "bindings/cuda.h"

namespace rpg {

void bind_cuda(py::module_& m) {
  py::class_<Plan>(m, "Plan", "How a launch is laid out.")
      .def_property_readonly("fill", [](const Plan& plan) { return static_cast<int>(plan.fill); })
      .def_readonly("rows", &Plan::rows)
      .def_readonly("parts", &Plan::parts)
      .def_readonly("tiles", &Plan::tiles)
      .def_readonly("places", &Plan::places)
      .def_readonly("stages", &Plan::stages)
      .def_readonly("splits", &Plan::splits)
      .def_readonly("batch_tile", &Plan::batch_tile)
      .def_readonly("batch_tiles", &Plan::batch_tiles)
      .def_readonly("shared_bytes", &Plan::shared_bytes)
      .def_readonly("workspace", &Plan::workspace)
      .def_readonly("counters", &Plan::counters);
  py::module_ cuda = m.def_submodule("cuda", "The CUDA kernels, on the current device.");
  bind_plan<cuda::plan_linear>(cuda, "plan_linear");
  bind_plan<cuda::plan_linear_input_grad>(cuda, "plan_linear_input_grad");
  bind_plan<cuda::plan_linear_bank_grad>(cuda, "plan_linear_bank_grad");
  bind<cuda::linear, cuda::linear_input_grad, cuda::linear_bank_grad>(cuda);
  bind_unpack<cuda::unpack, cuda::pack>(cuda);
  bind_law<cuda::law>(cuda);
}

}  // namespace rpg
