// What the CUDA kernels of a linear layer's gradients are given.

#pragma once

#include "cuda/linear.h"

namespace rpg {

// dx [batch, K] = scale · dy [batch, N] · (G ring); dtype of ring, dy and dx.
struct CudaLinearInputGradArgs {
  Dtype dtype;
  const void* ring;  // [slots, block], aligned to 16 bytes
  const void* dy;    // [batch, N]
  void* dx;          // [batch, K]
  int64_t batch;
  int64_t columns;  // K
  double scale;
  float* workspace;    // [plan.workspace]: [tiles, batch, K]
  unsigned* counters;  // [plan.counters]: [batch tiles, splits]
  void* stream;
};

// dw [slots, block] = scale · Gᵀ · (dy [batch, N]ᵀ x [batch, K]); dtype of dy and x.
struct CudaLinearBankGradArgs {
  Dtype dtype;
  const void* dy;  // [batch, N]
  const void* x;   // [batch, K]
  float* dw;       // [slots, block], all of it written
  int64_t batch;
  int64_t columns;  // K
  double scale;
  float* workspace;    // [plan.workspace]: [splits, slots, block]
  unsigned* counters;  // [plan.counters]: [tiles]
  void* stream;
};

namespace cuda {
Plan plan_linear_input_grad(const LayerLaw&, Dtype, int64_t batch, int64_t columns, const Device&);
Plan plan_linear_bank_grad(const LayerLaw&, Dtype, int64_t batch, int64_t columns, const Device&);
void linear_input_grad(const LayerLaw&, const Plan&, const CudaLinearInputGradArgs&);
void linear_bank_grad(const LayerLaw&, const Plan&, const CudaLinearBankGradArgs&);
}  // namespace cuda
namespace simt {
Plan plan_linear_input_grad(const LayerLaw&, Dtype, int64_t batch, int64_t columns, const Device&);
Plan plan_linear_bank_grad(const LayerLaw&, Dtype, int64_t batch, int64_t columns, const Device&);
void linear_input_grad(const LayerLaw&, const Plan&, const CudaLinearInputGradArgs&);
void linear_bank_grad(const LayerLaw&, const Plan&, const CudaLinearBankGradArgs&);
}  // namespace simt

}  // namespace rpg
