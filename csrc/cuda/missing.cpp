// What stands in for the CUDA sources when they are not compiled.

#include <stdexcept>

#include "cuda/ladder.h"
#include "cuda/law.h"
#include "cuda/linear_grads.h"
#include "cuda/unpack.h"

namespace rpg::cuda {

namespace {

[[noreturn]] void missing() {
  throw std::runtime_error(
      "rpg_kernels was built without CUDA kernels; `rpg-kernels doctor` says why");
}

}  // namespace

void law(const LayerLaw&, const CudaLawArgs&) { missing(); }

Plan plan_linear(const LayerLaw&, Dtype, int64_t, int64_t, const Device&) { missing(); }
Plan plan_linear_input_grad(const LayerLaw&, Dtype, int64_t, int64_t, const Device&) { missing(); }
Plan plan_linear_bank_grad(const LayerLaw&, Dtype, int64_t, int64_t, const Device&) { missing(); }
void linear(const LayerLaw&, const Plan&, const CudaLinearArgs&) { missing(); }
void linear_input_grad(const LayerLaw&, const Plan&, const CudaLinearInputGradArgs&) { missing(); }
void linear_bank_grad(const LayerLaw&, const Plan&, const CudaLinearBankGradArgs&) { missing(); }
void unpack(const LayerLaw&, const CudaUnpackArgs&) { missing(); }
void pack(const LayerLaw&, const CudaPackArgs&) { missing(); }
void ladder_linear(const LayerLaw&, int, const LadderArgs&) { missing(); }

}  // namespace rpg::cuda
