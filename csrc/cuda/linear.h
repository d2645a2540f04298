// What the CUDA kernels of a linear layer are given, and how a launch is laid out (plan.cpp).

#pragma once

#include <cstdint>
#include <functional>

#include "law/number.h"
#include "law/unit.h"

namespace rpg {

struct LayerLaw;  // law/layer.h: what the host knows of a layer

constexpr int kThreads = 256;   // of a CTA
constexpr int kMaxRows = 1024;  // of a tile, 4 of a thread
constexpr int kMmaBlocks = 16;  // that a warp multiplies at once by tensor cores
constexpr int kStages = 3;      // at most; two where three do not fit, a ring needs one
constexpr int kAlign = 16;      // bytes: arrays in shared memory begin at multiples of it

// What a launch knows of its layer: a matrix, in one band.
struct Layer {
  BandLaw ring;     // The law of the band, if it is law 1,
  UnitBand unit;    // or if it is law 3, whose units have one tap here.
  bool units;       // Whether it is law 3.
  uint32_t slots;   // of the ring
  int rows;         // N
  int blocks;       // A row has so many blocks.
  int block;        // A block has so many elements.
  int columns;      // K
  Reflect reflect;  // What has a sign of its own.
};

// What the shared memory of a CTA holds for a column of its tile: the window of the unit that its
// rows belong to; the whole bank; or at place i the block of row i.
enum class Fill : int { kWindows = 0, kRing = 1, kGather = 2 };

// How the rows of a layer are cut into tiles. In windows a tile is a group of law 3, or an equal
// part of one, so that it has one unit in each column.
struct Tiling {
  Fill fill;
  int rows;    // No tile has more rows.
  int parts;   // A group of rows is cut into so many tiles; 1 where tiles are no groups.
  int tiles;   // There are so many; bank gradient: CTAs that own different slots.
  int places;  // A stage holds so many blocks, a multiple of kMmaBlocks; bank gradient: of a CTA.
  int stages;  // So many stages are in flight.
};

// How a call is divided; chosen on the host by `plan_*`, the same on GPU and CPU. The bank gradient
// cuts the ring and not the rows: fields that say nothing about it are 0 there.
struct Plan : Tiling {
  int splits;         // So many CTAs share the columns of a tile; bank gradient: the same slots.
  int batch_tile;     // So many rows of the batch are multiplied at a time.
  int batch_tiles;    // That makes so many tiles of the batch.
  int shared_bytes;   // A CTA needs so much shared memory.
  int64_t workspace;  // The workspace has so many floats.
  int counters;       // There are so many unsigned numbers, zero before and after a launch.
};

// What a plan depends on beside the layer.
struct Device {
  int sms;           // It has so many streaming multiprocessors.
  int shared_bytes;  // A CTA may have so much shared memory.
};

static inline int round_up(int64_t x, int step) {
  return static_cast<int>((x + step - 1) / step * step);
}

// What kernels know of one band of a layer.
Layer layer_of(const LayerLaw& law, int64_t columns, int64_t band = 0);

// Returns the plan of a product: the largest steps, up to `largest` rows of the batch, whose shared
// memory, bytes(tiling, batch_tile), a CTA may have. Kernels add workspace and counters themselves.
Plan plan_tiles(const LayerLaw& law, int row_bytes, int64_t batch, int largest,
                const Device& device, const std::function<int(const Tiling&, int)>& bytes);

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
  float* workspace;    // [plan.workspace]: [splits, batch, N]
  unsigned* counters;  // [plan.counters]: [batch tiles, tiles]
  void* stream;        // On the CPU it is the order in which threads run.
};

namespace cuda {
Plan plan_linear(const LayerLaw&, Dtype, int64_t batch, int64_t columns, const Device&);
void linear(const LayerLaw&, const Plan&, const CudaLinearArgs&);
}  // namespace cuda
namespace simt {
Plan plan_linear(const LayerLaw&, Dtype, int64_t batch, int64_t columns, const Device&);
void linear(const LayerLaw&, const Plan&, const CudaLinearArgs&);
}  // namespace simt

}  // namespace rpg
