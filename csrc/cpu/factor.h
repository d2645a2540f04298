// The products that a factored layer is made of, and the sums that go with them.
//
// A column of blocks reads slots w of the ring: Ŵ[n, b] = ± ring[slot(n)]. So with BATCH rows of x
//
//   S[w] = ring[w] · x_b        y[n] += ± S[slot(n)]
//
// and the multiplications are those of the ring, not of the rows that read it. Layouts: S [slots,
// BATCH]; y [rows, BATCH]; x_b [block, BATCH] ("by element") when BATCH is 8 or 16, [BATCH, block]
// ("by row") when it is 1 or 4. All fp32. Multiplications per slot and batch row: `block`.
// Additions per position: one vector of BATCH lanes, a load of S and of y beside it.

#pragma once

#include "cpu/bank.h"
#include "cpu/simd.h"

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

constexpr bool by_row(int batch) { return batch <= 4; }

// The parts of an entry: the slot that a position reads, and in its highest bit the sign.
inline uint32_t slot_of(uint32_t entry) { return entry & 0x7FFFFFFFu; }
inline uint32_t sign_of(uint32_t entry) { return entry & 0x80000000u; }

// The blocks of the ring.
template <int BLOCK>
class RingBlocks {
 public:
  // Of each block `valid` elements count.
  RingBlocks(const Bank& bank, int valid)
      : ring_{bank, 0, BLOCK},
        valid_(valid),
        bytes_(ring_.row_bytes()),
        plain_(ring_.plain()),
        direct_(plain_ && bank.dtype == Dtype::kFloat32 && valid == BLOCK) {}

  // Block `slot` as fp32 with zeros behind the valid elements: itself if it is that already, or
  // converted into `buffer` [BLOCK].
  const float* block(int64_t slot, float* buffer) const {
    const char* stored = static_cast<const char*>(ring_.data) + slot * bytes_;
    if (direct_) return reinterpret_cast<const float*>(stored);
    if (!plain_) return stored_block(slot, buffer);
    switch (ring_.dtype) {
      case Dtype::kBfloat16: convert<Bfloat16>(stored, buffer); break;
      case Dtype::kFloat16: convert<Float16>(stored, buffer); break;
      default: convert<Float32>(stored, buffer); break;
    }
    for (int e = valid_; e < BLOCK; ++e) buffer[e] = 0.f;
    return buffer;
  }

  int valid() const { return valid_; }

 private:
  template <class T>
  static void convert(const char* stored, float* buffer) {
    const typename T::Bits* bits = reinterpret_cast<const typename T::Bits*>(stored);
#pragma omp simd
    for (int e = 0; e < BLOCK; ++e) buffer[e] = T::load(bits[e]);
  }

  const float* stored_block(int64_t slot, float* buffer) const {
    const int count = ring_.has(slot) ? valid_ : 0;
    if (count) read_slot(ring_, slot, count, buffer);
    for (int e = count; e < BLOCK; ++e) buffer[e] = 0.f;
    return buffer;
  }

  Ring ring_;  // its number of slots is not read
  int valid_;
  int64_t bytes_;
  bool plain_, direct_;  // direct: a block is read as it is stored
};

// out[r] = block r · x_b for COUNT blocks given by their addresses.
template <int BLOCK, int BATCH, int COUNT>
inline void products(const float* const (&block)[COUNT], const float* x, float* out) {
  if constexpr (by_row(BATCH)) {
    static_assert(COUNT * BATCH == 16, "sums of 16 dot products at a time");
    constexpr int kParts = BLOCK / 16;
    Floats<16> sum[16];
    for (int r = 0; r < COUNT; ++r) {
      for (int m = 0; m < BATCH; ++m) {
        sum[r * BATCH + m] = load<16>(block[r]) * load<16>(x + m * BLOCK);
      }
      for (int part = 1; part < kParts; ++part) {
        const Floats<16> w = load<16>(block[r] + 16 * part);
        for (int m = 0; m < BATCH; ++m) {
          sum[r * BATCH + m] += w * load<16>(x + m * BLOCK + 16 * part);
        }
      }
    }
    store<16>(out, sum_rows(sum));
  } else {
    Floats<BATCH> sum[COUNT] = {};
    for (int e = 0; e < BLOCK; ++e) {
      const Floats<BATCH> xe = load<BATCH>(x + e * BATCH);
#pragma GCC unroll 8
      for (int r = 0; r < COUNT; ++r) sum[r] += splat<BATCH>(block[r][e]) * xe;
    }
    for (int r = 0; r < COUNT; ++r) store<BATCH>(out + r * BATCH, sum[r]);
  }
}

// Blocks that one call of `products` takes.
constexpr int product_rows(int batch) { return by_row(batch) ? 16 / batch : kProductRows; }

// S[w] = ring[w] · x_b for all slots.
template <int BLOCK, int BATCH>
inline void slot_products(const RingBlocks<BLOCK>& ring, int slots, const float* x, float* s) {
  constexpr int kRows = product_rows(BATCH);
  alignas(64) float buffer[kRows][BLOCK];
  for (int w = 0; w < slots; w += kRows) {
    const int count = slots - w < kRows ? slots - w : kRows;
    const float* block[kRows];
    for (int r = 0; r < kRows; ++r) block[r] = ring.block(w + (r < count ? r : 0), buffer[r]);
    if (count == kRows) {
      products<BLOCK, BATCH>(block, x, s + int64_t{w} * BATCH);
    } else {
      float out[kRows * BATCH];
      products<BLOCK, BATCH>(block, x, out);
      std::memcpy(s + int64_t{w} * BATCH, out, sizeof(float) * count * BATCH);
    }
  }
}

// y[i] += ± S[slot(i)]. With BATCH 1, S holds all negatives behind the values: [2, slots].
template <int BATCH>
inline void add_products(const uint32_t* entry, int count, const float* s, int slots, float* y) {
  if constexpr (BATCH == 1) {
#pragma omp simd
    for (int i = 0; i < count; ++i) {
      y[i] += s[static_cast<int>(slot_of(entry[i])) + static_cast<int>(entry[i] >> 31) * slots];
    }
  } else {
    for (int i = 0; i < count; ++i) {
      const Floats<BATCH> read = load<BATCH>(s + int64_t{slot_of(entry[i])} * BATCH);
      store<BATCH>(y + i * BATCH,
                   load<BATCH>(y + i * BATCH) + flip_all<BATCH>(read, sign_of(entry[i])));
    }
  }
}

// y[i] += ± block(slot(i)) · x_b, block by block.
template <int BLOCK, int BATCH>
inline void direct_products(const uint32_t* entry, int count, const RingBlocks<BLOCK>& ring,
                            const float* x, float* y) {
  constexpr int kRows = product_rows(BATCH);
  alignas(64) float buffer[kRows][BLOCK];
  alignas(64) float out[kRows * BATCH];
  for (int i = 0; i < count; i += kRows) {
    const int size = count - i < kRows ? count - i : kRows;
    const float* block[kRows];
    for (int r = 0; r < kRows; ++r) {
      block[r] = ring.block(slot_of(entry[i + (r < size ? r : 0)]), buffer[r]);
    }
    products<BLOCK, BATCH>(block, x, out);
    for (int r = 0; r < size; ++r) {
      const uint32_t sign = sign_of(entry[i + r]);
      if constexpr (BATCH == 1) {
        y[i + r] += as_float(as_bits(out[r]) ^ sign);
      } else {
        float* sums = y + (i + r) * BATCH;
        store<BATCH>(sums, load<BATCH>(sums) + flip_all<BATCH>(load<BATCH>(out + r * BATCH), sign));
      }
    }
  }
}

}  // namespace
}  // namespace rpg
