// The bank as kernels read it, and rows of it as fp32.

#pragma once

#include "cpu/lanes.h"
#include "cpu/stored.h"

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

// The bank: `slots` rows of `block` elements. Slots are those of a layer, one for each of its
// blocks.
struct Ring : Bank {
  int64_t slots;
  int block;

  int64_t row_bytes() const { return int64_t{block} * element_bytes(dtype); }
  // Where a slot lies in a bank that has no places.
  const char* slot(int64_t i) const { return static_cast<const char*>(data) + i * row_bytes(); }

  // Whether the bank has a slot; otherwise its values are zeros.
  bool has(int64_t i) const { return !places || static_cast<uint32_t>(places[i >> shift]) < rows; }
  // Of a slot that it has: where it lies, and the scale of its codes.
  const char* find(int64_t i) const {
    return places ? slot(row_of(i) << shift | (i & ((1 << shift) - 1))) : slot(i);
  }
  float scale_of(int64_t i) const { return scales ? scales[row_of(i)] : 1.f; }

 private:
  int64_t row_of(int64_t i) const { return places ? places[i >> shift] : i >> shift; }
};

// Of `count` slots from `first` on, around the end of the ring, how many the bank has.
inline int64_t present_slots(const Ring& ring, int64_t first, int64_t count) {
  if (!ring.places) return count;
  int64_t present = 0;
  for (int64_t k = 0, slot = first; k < count; ++k) {
    present += ring.has(slot);
    if (++slot == ring.slots) slot = 0;
  }
  return present;
}

// The first `count` elements of a slot that the bank has, as fp32.
inline void read_slot(const Ring& ring, int64_t slot, int count, float* out) {
  const char* source = ring.find(slot);
  if (!ring.scales) return read_some(ring.dtype, source, count, out);
  const float scale = ring.scale_of(slot);
#pragma omp simd
  for (int e = 0; e < count; ++e)
    out[e] = scale * static_cast<float>(static_cast<int8_t>(source[e]));
}

// Calls visit(k, slot) for those of `count` slots from `first` on that the bank has; k counts them
// and no others.
template <class Visit>
inline void for_present(const Ring& ring, int64_t first, int64_t count, const Visit& visit) {
  int64_t present = 0;
  for (int64_t k = 0, slot = first; k < count; ++k) {
    if (ring.has(slot)) visit(present++, slot);
    if (++slot == ring.slots) slot = 0;
  }
}

// Rows of `count` slots from `first` on, around the end of the ring, as far as the bank has them:
// its own where it is fp32 and has them in one piece, otherwise converted into `buffer` [count,
// block].
inline const float* window_rows(const Ring& ring, int64_t first, int64_t count, float* buffer) {
  if (!ring.plain()) {
    for_present(ring, first, count, [&](int64_t k, int64_t slot) {
      read_slot(ring, slot, ring.block, buffer + k * ring.block);
    });
    return buffer;
  }
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

// Of a window of `count` slots, of which the bank has `present`: their lines, one after the other,
// go to where those of all slots are, [count, floats] with lines `step` apart; others are zeros.
// From the end, so that no line is written over before it has moved.
inline void spread_lines(const Ring& ring, int64_t first, int64_t count, int64_t present,
                         int64_t step, int64_t floats, float* lines) {
  for (int64_t k = count - 1; k >= present; --k) {  // the first `present` lines are in place then
    float* line = lines + k * step;
    if (ring.has((first + k) % ring.slots)) {
      std::memcpy(line, lines + --present * step, sizeof(float) * floats);
    } else {
      std::memset(line, 0, sizeof(float) * floats);
    }
  }
}

// out [block] = ± a slot, negative where `sign` is 0x80000000 and not 0.
inline void copy_slot(const Ring& ring, int64_t slot, uint32_t sign, float* out) {
  const char* source = ring.slot(slot);
  const int step = ring.dtype == Dtype::kFloat32 ? 32 : 16;
  for (int e = 0; e < ring.block; e += 8, source += step) {
    store<8>(out + e, flip_all<8>(load_eight(ring.dtype, source), sign));
  }
}

// The same of a bank that is not plain.
inline void copy_stored_slot(const Ring& ring, int64_t slot, uint32_t sign, float* out) {
  if (!ring.has(slot)) {
    std::memset(out, 0, sizeof(float) * ring.block);
    return;
  }
  read_slot(ring, slot, ring.block, out);
  for (int e = 0; e < ring.block; e += 8) store<8>(out + e, flip_all<8>(load<8>(out + e), sign));
}

}  // namespace
}  // namespace rpg
