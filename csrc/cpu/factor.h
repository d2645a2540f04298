// The products that a factored layer is made of, and the sums that go with them.
//
// A column of blocks reads rows w of a window: Ŵ[n, b] = ± window[slot(n)]. So with BATCH rows of x
//
//   forward     S[w] = window[w] · x_b        y[n]  += ± S[slot(n)]
//   backward    T[slot(n)] += ± dy[n]         dx_b  += Σ_w T[w] window[w]
//                                             dw[w] += Σ_m T[w, m] x_b[m]
//
// and the multiplications are those of the window, not of the rows that read it. Layouts: S and T
// [slots, BATCH]; y and dy [rows, BATCH]; x_b and dx_b [block, BATCH] ("by element") when BATCH is
// 8 or 16, [BATCH, block] ("by row") when it is 1 or 4. All fp32. Multiplications per slot and
// batch row: `block`. Additions per position: one vector of BATCH lanes, a load of S and of y
// beside it.

#pragma once

#include "cpu/simd.h"
#include "law/number.h"

namespace rpg {
namespace {  // compiled once per instruction set, see law/ring.h

constexpr bool by_row(int batch) { return batch <= 4; }

// The parts of an entry: the slot that a position reads, and in its highest bit the sign.
template <class Entry>
struct EntryOf {
  static constexpr int kShift = 8 * sizeof(Entry) - 1;
  static inline uint32_t slot(Entry e) { return e & static_cast<Entry>((Entry{1} << kShift) - 1); }
  static inline uint32_t sign(Entry e) { return static_cast<uint32_t>(e >> kShift) << 31; }
};

// A window of the ring: its blocks from slot `base` on, around the end of the ring.
template <int BLOCK>
class RingWindow {
 public:
  // ring [slots, BLOCK]; of each block `valid` elements count.
  RingWindow(Dtype dtype, const void* ring, uint32_t slots, uint32_t base, int valid)
      : dtype_(dtype),
        valid_(valid),
        bytes_(BLOCK * (dtype == Dtype::kFloat32 ? 4 : 2)),
        before_end_(static_cast<int64_t>(slots) - base) {
    part_[0] = static_cast<const char*>(ring) + base * bytes_;
    part_[1] = part_[0] - slots * bytes_;
  }

  // Block `slot` as fp32 with zeros behind the valid elements: itself if it is that already, or
  // converted into `buffer` [BLOCK].
  const float* block(int64_t slot, float* buffer) const {
    const char* stored = part_[slot >= before_end_] + slot * bytes_;
    if (dtype_ == Dtype::kFloat32 && valid_ == BLOCK) return reinterpret_cast<const float*>(stored);
    switch (dtype_) {
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

  Dtype dtype_;
  int valid_;
  int64_t bytes_;
  int64_t before_end_;
  const char* part_[2];
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

// S[w] = window[w] · x_b for the first `slots` slots.
template <int BLOCK, int BATCH>
inline void window_products(const RingWindow<BLOCK>& window, int slots, const float* x, float* s) {
  constexpr int kRows = product_rows(BATCH);
  alignas(64) float buffer[kRows][BLOCK];
  for (int w = 0; w < slots; w += kRows) {
    const int count = slots - w < kRows ? slots - w : kRows;
    const float* block[kRows];
    for (int r = 0; r < kRows; ++r) block[r] = window.block(w + (r < count ? r : 0), buffer[r]);
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
template <int BATCH, class Entry>
inline void add_products(const Entry* entry, int count, const float* s, int slots, float* y) {
  using Read = EntryOf<Entry>;
  if constexpr (BATCH == 1) {
#pragma omp simd
    for (int i = 0; i < count; ++i) {
      y[i] += s[static_cast<int>(Read::slot(entry[i])) +
                static_cast<int>(entry[i] >> Read::kShift) * slots];
    }
  } else {
    for (int i = 0; i < count; ++i) {
      const Floats<BATCH> read = load<BATCH>(s + int64_t{Read::slot(entry[i])} * BATCH);
      store<BATCH>(y + i * BATCH,
                   load<BATCH>(y + i * BATCH) + flip_all<BATCH>(read, Read::sign(entry[i])));
    }
  }
}

// y[i] += ± block(slot(i)) · x_b, block by block.
template <int BLOCK, int BATCH, class Entry>
inline void direct_products(const Entry* entry, int count, const RingWindow<BLOCK>& window,
                            const float* x, float* y) {
  using Read = EntryOf<Entry>;
  constexpr int kRows = product_rows(BATCH);
  alignas(64) float buffer[kRows][BLOCK];
  alignas(64) float out[kRows * BATCH];
  for (int i = 0; i < count; i += kRows) {
    const int size = count - i < kRows ? count - i : kRows;
    const float* block[kRows];
    for (int r = 0; r < kRows; ++r) {
      block[r] = window.block(Read::slot(entry[i + (r < size ? r : 0)]), buffer[r]);
    }
    products<BLOCK, BATCH>(block, x, out);
    for (int r = 0; r < size; ++r) {
      const uint32_t sign = Read::sign(entry[i + r]);
      if constexpr (BATCH == 1) {
        y[i + r] += as_float(as_bits(out[r]) ^ sign);
      } else {
        float* sums = y + (i + r) * BATCH;
        store<BATCH>(sums, load<BATCH>(sums) + flip_all<BATCH>(load<BATCH>(out + r * BATCH), sign));
      }
    }
  }
}

// t[i] = ± dy[i] and slot[i], position by position.
template <int BATCH, class Entry>
inline void signed_terms(const Entry* entry, int count, const float* dy, float* t, int32_t* slot) {
  using Read = EntryOf<Entry>;
  for (int i = 0; i < count; ++i) {
    slot[i] = static_cast<int32_t>(Read::slot(entry[i]));
    for (int m = 0; m < BATCH; ++m) {
      t[i * BATCH + m] = as_float(as_bits(dy[i * BATCH + m]) ^ Read::sign(entry[i]));
    }
  }
}

// Which of `slots` slots are read, in order; returns how many.
template <class Entry>
inline int slots_read(const Entry* entry, int count, int slots, int32_t* slot) {
  for (int w = 0; w < slots; ++w) slot[w] = 0;
  for (int i = 0; i < count; ++i) slot[EntryOf<Entry>::slot(entry[i])] = 1;
  int read = 0;
  for (int w = 0; w < slots; ++w) {
    const int32_t used = slot[w];
    slot[read] = w;
    read += used;
  }
  return read;
}

// T[slot(i)] += ± dy[i], one position after the other.
template <int BATCH, class Entry>
inline void scatter(const Entry* entry, int count, const float* dy, float* t) {
  using Read = EntryOf<Entry>;
  for (int i = 0; i < count; ++i) {
    const uint32_t sign = Read::sign(entry[i]);
    if constexpr (BATCH == 1) {
      t[Read::slot(entry[i])] += as_float(as_bits(dy[i]) ^ sign);
    } else {
      float* sums = t + int64_t{Read::slot(entry[i])} * BATCH;
      store<BATCH>(sums, load<BATCH>(sums) + flip_all<BATCH>(load<BATCH>(dy + i * BATCH), sign));
    }
  }
}

// What the backward products sum over: slots w of a window, each with its T [BATCH].
struct Terms {
  int count;
  const int32_t* slot;  // [count]; null: 0, 1, 2 ...
  const float* t;       // [slots, BATCH], or in the order of terms: [count, BATCH]
  bool in_order;
  int64_t slot_of(int i) const { return slot ? slot[i] : i; }
  template <int BATCH>
  const float* sums(int i) const {
    return t + (in_order ? i : slot_of(i)) * BATCH;
  }
};

// dx_b += Σ T[w] window[w] of the terms `begin` to `end` - 1.
template <int BLOCK, int BATCH>
inline void add_input_grad_of(const RingWindow<BLOCK>& window, const Terms& terms, int begin,
                              int end, float* dx) {
  constexpr int kRows = 16;
  alignas(64) float buffer[kRows][BLOCK];
  for (int i = begin; i < end; i += kRows) {
    const int size = end - i < kRows ? end - i : kRows;
    const float* block[kRows];
    const float* sum[kRows];
    for (int r = 0; r < size; ++r) {
      block[r] = window.block(terms.slot_of(i + r), buffer[r]);
      sum[r] = terms.sums<BATCH>(i + r);
    }
    if constexpr (by_row(BATCH)) {
      constexpr int kPart = BLOCK < 64 ? BLOCK : 64, kVectors = kPart / 16;
      for (int part = 0; part < BLOCK; part += kPart) {
        Floats<16> out[BATCH][kVectors];
        for (int m = 0; m < BATCH; ++m) {
          for (int v = 0; v < kVectors; ++v) {
            out[m][v] = load<16>(dx + m * BLOCK + part + 16 * v);
          }
        }
        for (int r = 0; r < size; ++r) {
          for (int v = 0; v < kVectors; ++v) {
            const Floats<16> w = load<16>(block[r] + part + 16 * v);
            for (int m = 0; m < BATCH; ++m) out[m][v] += splat<16>(sum[r][m]) * w;
          }
        }
        for (int m = 0; m < BATCH; ++m) {
          for (int v = 0; v < kVectors; ++v) {
            store<16>(dx + m * BLOCK + part + 16 * v, out[m][v]);
          }
        }
      }
    } else {
      constexpr int kPart = kProductRows;
      for (int part = 0; part < BLOCK; part += kPart) {
        Floats<BATCH> out[kPart];
        for (int e = 0; e < kPart; ++e) out[e] = load<BATCH>(dx + (part + e) * BATCH);
        for (int r = 0; r < size; ++r) {
          const Floats<BATCH> tr = load<BATCH>(sum[r]);
#pragma GCC unroll 8
          for (int e = 0; e < kPart; ++e) out[e] += splat<BATCH>(block[r][part + e]) * tr;
        }
        for (int e = 0; e < kPart; ++e) store<BATCH>(dx + (part + e) * BATCH, out[e]);
      }
    }
  }
}

// dx_b += Σ T[w] window[w] of all terms: sums of 64 are made first, since one sum of thousands
// loses two decimal places.
template <int BLOCK, int BATCH>
inline void add_input_grad(const RingWindow<BLOCK>& window, const Terms& terms, float* dx) {
  constexpr int kSummedTerms = 64;
  alignas(64) float part[BLOCK * BATCH];
  for (int begin = 0; begin < terms.count; begin += kSummedTerms) {
    const int end = terms.count - begin < kSummedTerms ? terms.count : begin + kSummedTerms;
    std::memset(part, 0, sizeof part);
    add_input_grad_of<BLOCK, BATCH>(window, terms, begin, end, part);
    for (int i = 0; i < BLOCK * BATCH; ++i) dx[i] += part[i];
  }
}

// dw[w] += scale · Σ_m T[w, m] x_b[m]; dw of slot w is at part[w >= before_end] [w, BLOCK], x_b by
// row [batch, BLOCK]. A slot may be among the terms several times.
template <int BLOCK, int BATCH>
inline void add_bank_grad(const Terms& terms, const float* x, int batch, int valid, float scale,
                          float* const (&part)[2], int64_t before_end) {
  constexpr int kPart = BLOCK < 64 ? BLOCK : 64, kVectors = kPart / 16;
  constexpr int kRows = kProductRows / 2;
  for (int i = 0; i < terms.count; i += kRows) {
    const int size = terms.count - i < kRows ? terms.count - i : kRows;
    const float* sum[kRows];
    float* grad[kRows];
    for (int r = 0; r < kRows; ++r) {
      const int term = i + (r < size ? r : 0);
      sum[r] = terms.sums<BATCH>(term);
      grad[r] = part[terms.slot_of(term) >= before_end] + terms.slot_of(term) * BLOCK;
    }
    for (int first = 0; first < BLOCK; first += kPart) {
      Floats<16> out[kRows][kVectors] = {};
      for (int m = 0; m < batch; ++m) {
        Floats<16> xm[kVectors];
        for (int v = 0; v < kVectors; ++v) xm[v] = load<16>(x + m * BLOCK + first + 16 * v);
        for (int r = 0; r < kRows; ++r) {
          for (int v = 0; v < kVectors; ++v) out[r][v] += splat<16>(sum[r][m]) * xm[v];
        }
      }
      for (int r = 0; r < size; ++r) {
        for (int v = 0; v < kVectors; ++v) {
          const int e = first + 16 * v;
          const Floats<16> added = load<16>(grad[r] + e) + splat<16>(scale) * out[r][v];
          if (e + 16 <= valid) {
            store<16>(grad[r] + e, added);
          } else {  // padding is no weight: its gradient stays
            for (int k = 0; e + k < valid; ++k) grad[r][e + k] = added[k];
          }
        }
      }
    }
  }
}

constexpr int kTerms = 512;  // made at once where each position is a term

// Calls visit(terms) for a piece of a column and dy [rows, BATCH] of its rows: sums for each slot
// where that is less, otherwise position by position. t [max(kTerms, slots), BATCH] and slot [the
// same] are where terms are made.
template <int BATCH, class Entry, class Visit>
inline void for_terms(const Entry* entry, int count, int slots, bool whole, const float* dy,
                      float* t, int32_t* slot, const Visit& visit) {
  if (slots >= count) {
    for (int i = 0; i < count; i += kTerms) {
      const int size = count - i < kTerms ? count - i : kTerms;
      signed_terms<BATCH>(entry + i, size, dy + i * BATCH, t, slot);
      visit(Terms{size, slot, t, true});
    }
    return;
  }
  std::memset(t, 0, sizeof(float) * slots * BATCH);
  scatter<BATCH>(entry, count, dy, t);
  // A slot that nobody reads must not be multiplied: it may hold an infinity.
  if (whole) return visit(Terms{slots, nullptr, t, false});
  visit(Terms{slots_read(entry, count, slots, slot), slot, t, false});
}

}  // namespace
}  // namespace rpg
