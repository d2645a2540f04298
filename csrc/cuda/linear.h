// What the CUDA kernels of a linear layer are given, and how a launch is laid out.

#pragma once

#include <cstdint>

#include "law/layer.h"
#include "law/number.h"

namespace rpg {

// What a plan depends on beside the layer.
struct Device {
  int sms;           // It has so many streaming multiprocessors.
  int shared_bytes;  // A CTA may have so much shared memory.
};

// How a call is divided; all integers, chosen on the host by `plan_*`, the same on GPU and CPU. The
// bank gradient cuts the ring and not the rows: fields that say nothing about it are 0 there.
struct Plan {
  int fill;           // What stages hold (cuda/tile.h): 0 windows, 1 ring, 2 gathered blocks.
  int rows;           // No tile has more rows.
  int parts;          // Windows: a group of rows is cut into so many tiles.
  int tiles;          // There are so many tiles; bank gradient: CTAs that own different slots.
  int places;         // A stage holds so many blocks; bank gradient: a CTA owns so many slots.
  int stages;         // So many stages are in flight.
  int splits;         // So many CTAs share the columns of a tile; bank gradient: the same slots.
  int batch_tile;     // So many rows of the batch are multiplied at a time.
  int batch_tiles;    // That makes so many tiles of the batch.
  int shared_bytes;   // A CTA needs so much shared memory.
  int64_t workspace;  // The workspace has so many floats.
  int counters;       // There are so many unsigned numbers, zero before and after a launch.
};

// y [batch, N] = scale · x [batch, K] · (G ring)ᵀ + bias; dtype of ring, x and y.
struct CudaLinearArgs {
  Dtype dtype;
  const void* ring;   // [slots, block], aligned to 16 bytes
  const void* x;      // [batch, K]
  const float* bias;  // [N] or null
  void* y;            // [batch, N]
  int64_t batch;
  int64_t columns;  // K
  double scale;
  float* workspace;    // [plan.workspace]
  unsigned* counters;  // [plan.counters]
  void* stream;        // On the CPU it is the order in which threads run.
};

// dx [batch, K] = scale · dy [batch, N] · (G ring); dtype of ring, dy and dx.
struct CudaLinearInputGradArgs {
  Dtype dtype;
  const void* ring;  // [slots, block], aligned to 16 bytes
  const void* dy;    // [batch, N]
  void* dx;          // [batch, K]
  int64_t batch;
  int64_t columns;  // K
  double scale;
  float* workspace;    // [plan.workspace]
  unsigned* counters;  // [plan.counters]
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
  float* workspace;    // [plan.workspace]
  unsigned* counters;  // [plan.counters]
  void* stream;
};

#define RPG_DECLARE_DEVICE(DEVICE)                                                         \
  namespace DEVICE {                                                                       \
  Plan plan_linear(const LayerLaw&, Dtype, int64_t batch, int64_t columns, const Device&); \
  Plan plan_linear_input_grad(const LayerLaw&, Dtype, int64_t batch, int64_t columns,      \
                              const Device&);                                              \
  Plan plan_linear_bank_grad(const LayerLaw&, Dtype, int64_t batch, int64_t columns,       \
                             const Device&);                                               \
  void linear(const LayerLaw&, const Plan&, const CudaLinearArgs&);                        \
  void linear_input_grad(const LayerLaw&, const Plan&, const CudaLinearInputGradArgs&);    \
  void linear_bank_grad(const LayerLaw&, const Plan&, const CudaLinearBankGradArgs&);      \
  }

RPG_DECLARE_DEVICE(cuda)
RPG_DECLARE_DEVICE(simt)

}  // namespace rpg
