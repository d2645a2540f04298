// Batches of activations, a tile of BATCH rows at a time, as the factored kernels want them: fp32,
// cut into the blocks of the virtual matrix, zeros where a row or the batch ends before the tile.

#pragma once

#include "cpu/factor.h"

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

inline float element(Dtype dtype, const void* values, int64_t i) {
  switch (dtype) {
    case Dtype::kBfloat16: return Bfloat16::load(static_cast<const uint16_t*>(values)[i]);
    case Dtype::kFloat16: return Float16::load(static_cast<const uint16_t*>(values)[i]);
    default: return static_cast<const float*>(values)[i];
  }
}

inline void set_element(Dtype dtype, void* values, int64_t i, float value) {
  switch (dtype) {
    case Dtype::kBfloat16: static_cast<uint16_t*>(values)[i] = Bfloat16::store(value); break;
    case Dtype::kFloat16: static_cast<uint16_t*>(values)[i] = Float16::store(value); break;
    default: static_cast<float*>(values)[i] = value; break;
  }
}

// Loads one block of rows m0 ... of x [batch, columns]: out [BLOCK, BATCH] or, BY_ROW, [BATCH,
// BLOCK].
template <int BLOCK, int BATCH, bool BY_ROW>
inline void load_block(Dtype dtype, const void* x, int64_t columns, int64_t m0, int rows,
                       int64_t block, float* out) {
  const int64_t column = block * BLOCK;
  const int valid = static_cast<int>(columns - column < BLOCK ? columns - column : BLOCK);
  for (int m = 0; m < BATCH; ++m) {
    for (int e = 0; e < BLOCK; ++e) {
      float& value = out[BY_ROW ? m * BLOCK + e : e * BATCH + m];
      value = m < rows && e < valid ? element(dtype, x, (m0 + m) * columns + column + e) : 0.f;
    }
  }
}

// A step of the batch: tiles of BATCH rows, each of all blocks, in memory of the caller.
template <int BLOCK, int BATCH, bool BY_ROW>
struct BatchTiles {
  float* memory;  // [tiles, blocks, BLOCK · BATCH]
  int64_t blocks;
  int64_t rows;  // of the step

  int count() const { return static_cast<int>((rows + BATCH - 1) / BATCH); }
  int rows_of(int tile) const {
    const int64_t left = rows - int64_t{tile} * BATCH;
    return static_cast<int>(left < BATCH ? left : BATCH);
  }
  float* block_of(int tile, int64_t block) const {
    return memory + (tile * blocks + block) * BLOCK * BATCH;
  }
  // Loads one block of rows m0 ... of x [batch, columns].
  void load(Dtype dtype, const void* x, int64_t columns, int64_t m0, int64_t block) const {
    for (int tile = 0; tile < count(); ++tile) {
      load_block<BLOCK, BATCH, BY_ROW>(dtype, x, columns, m0 + int64_t{tile} * BATCH, rows_of(tile),
                                       block, block_of(tile, block));
    }
  }
};

}  // namespace
}  // namespace rpg
