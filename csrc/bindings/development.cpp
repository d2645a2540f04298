// What only development builds have (RPG_SIMT in CMakeLists.txt): the submodule `simt`, which runs
// the CUDA kernels' own sources on the CPU, and the first steps of docs/ladder.md on both devices.

#include <vector>

#include "bindings/cuda.h"
#include "cuda/ladder.h"
#include "simt/accesses.h"

namespace rpg {
namespace {

template <void (*LADDER)(const LayerLaw&, int, const LadderArgs&)>
void ladder_linear(const LayerLaw& law, int step, uintptr_t ring, uintptr_t x, uintptr_t y,
                   int64_t columns, double scale, uintptr_t stream) {
  check_law(law);
  check_columns(law, columns);
  require(law.granularity == 64, "granularity: wanted blocks of 64 elements");
  require(law.reflect != Reflect::kElement, "reflect: wanted none or vector");
  require(step == 1 || step == 2, "step: wanted 1 or 2");
  require(ring % 4 == 0, "ring: wanted an address that is a multiple of 4");
  LADDER(law, step,
         {address<const void>(ring), address<const void>(x), address<void>(y), columns, scale,
          address<void>(stream)});
}

template <void (*LADDER)(const LayerLaw&, int, const LadderArgs&)>
void bind_ladder(py::module_& m) {
  m.def("ladder_linear", &ladder_linear<LADDER>, py::call_guard<py::gil_scoped_release>(),
        py::arg("law"), py::arg("step"), py::arg("ring"), py::arg("x"), py::arg("y"),
        py::arg("columns"), py::arg("scale"), py::arg("stream"));
}

// Accesses to shared memory while `body` runs: (file, line, CTA, thread, byte, bytes) of each.
py::list accesses_of(const py::function& body) {
  std::vector<simt::Access> found;
  struct Recording {
    explicit Recording(std::vector<simt::Access>* list) { simt::accesses = list; }
    ~Recording() { simt::accesses = nullptr; }
  };
  {
    const Recording recording(&found);
    body();
  }
  py::list out;
  for (const simt::Access& a : found) {
    out.append(py::make_tuple(a.site.file, a.site.line, a.cta, a.thread, a.offset, a.bytes));
  }
  return out;
}

}  // namespace

void bind_development(py::module_& m) {
  py::module_ cuda = m.attr("cuda").cast<py::module_>();
  bind_ladder<cuda::ladder_linear>(cuda);
  py::module_ simt = m.def_submodule("simt", "The CUDA kernels' sources, run on the CPU.");
  bind_plan<simt::plan_linear>(simt, "plan_linear");
  bind_plan<simt::plan_linear_input_grad>(simt, "plan_linear_input_grad");
  bind_plan<simt::plan_linear_bank_grad>(simt, "plan_linear_bank_grad");
  bind<simt::linear, simt::linear_input_grad, simt::linear_bank_grad>(simt);
  bind_unpack<simt::unpack, simt::pack>(simt);
  bind_law<simt::law>(simt);
  bind_ladder<simt::ladder_linear>(simt);
  simt.def("accesses_of", &accesses_of, py::arg("body"));
}

}  // namespace rpg
