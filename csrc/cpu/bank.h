// The bank as kernels read it, and rows of it as fp32.

#pragma once

#include "cpu/lanes.h"
#include "cpu/stored.h"

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

// The bank: `slots` rows of `block` elements.
struct Ring : Bank {
  int64_t slots;
  int block;
  const char* slot(int64_t i) const { return static_cast<const char*>(data) + i * row_bytes(); }
  int64_t row_bytes() const { return int64_t{block} * element_bytes(dtype); }
};

// Rows of `count` slots from `first` on, around the end of the ring: the ring's own where it is
// fp32 and has them in one piece, otherwise converted into `buffer` [count, block].
inline const float* window_rows(const Ring& ring, int64_t first, int64_t count, float* buffer) {
  const char* data = static_cast<const char*>(ring.data);
  const int64_t bytes = ring.row_bytes();
  if (ring.dtype == Dtype::kFloat32 && first + count <= ring.slots) {
    return reinterpret_cast<const float*>(data + first * bytes);
  }
  for (int64_t done = 0; done < count;) {
    const int64_t size = std::min(count - done, ring.slots - first);
    read_some(ring.dtype, data + first * bytes, static_cast<int>(size * ring.block),
              buffer + done * ring.block);
    done += size;
    first = 0;
  }
  return buffer;
}

// out [block] = ± a slot, negative where `sign` is 0x80000000 and not 0.
inline void copy_slot(const Ring& ring, int64_t slot, uint32_t sign, float* out) {
  const char* source = ring.slot(slot);
  const int step = ring.dtype == Dtype::kFloat32 ? 32 : 16;
  for (int e = 0; e < ring.block; e += 8, source += step) {
    store<8>(out + e, flip_all<8>(load_eight(ring.dtype, source), sign));
  }
}

}  // namespace
}  // namespace rpg
