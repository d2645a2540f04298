// unit_linear_int8_few: y [batch, N] = scale · x [batch, K] · (G ring)ᵀ + bias for the unit law, a
// bank of int8 codes and up to 4 rows of x, which are rounded to int8 (int8_rows.h).
//
// A unit, R rows of a column of blocks, reads W slots of a window. With x_b [M, block] in int8:
//
//   S [W / 8, M, 8]  = scale of the slot · (window · x_bᵀ)    whole numbers, converted once
//   y [R / 8, M, 8] += ± S [octet] [order]                    one permuted vector for 8 rows
//   y               := y · step of the row of x · scale + bias
//
// The bank is read as it is stored, a byte for each element: 16 KB for a window of 256 slots of 64,
// which comes from the second cache or from behind it; S has 1 KB for a row of x. Per 16 slots of
// 64, by tiles: a load of 16 lines, a product of 16 cycles, a store, and a conversion of 16 M sums.
// By dots, for each slot and row of x: a load, a change of top bits, a product, and 3 instructions
// that sum its 16 lanes. Plain: products of 16-bit numbers, as the compiler makes them of a loop.
// Per octet of rows: an entry, a load of S, a permutation, a sign and an addition.
//
// Threads share the columns, and add up what they have in order.

#include <optional>
#include <vector>

#include "cpu/int8_products.h"
#include "cpu/int8_rows.h"
#include "cpu/unit_sums.h"

namespace rpg::RPG_ISA {

namespace {

constexpr int kMostFew = 4;  // rows of x

// How the workspace is divided; bytes of one thread.
struct Int8FewLayout {
  int64_t x, words, s, y, codes, scales, entries, shuffled;
  int64_t bytes() const { return x + words + s + y + codes + scales + entries + shuffled; }
};

Int8FewLayout layout_of(const LayerLaw& law, const UnitPlan& plan, const Int8LinearArgs& args) {
  Int8FewLayout out{};
  const int64_t room = entries_room(plan.most_octets);
  const int64_t most_rows = padded_rows(plan.most_window * kOctet);
  out.x = out.words = lines(int64_t{args.lanes} * law.granularity);
  out.s = lines(4 * most_rows * args.lanes);
  out.y = lines(4 * int64_t{plan.band.octets} * kOctet * args.lanes);
  out.codes = lines(most_rows * law.granularity);
  out.scales = lines(4 * most_rows);
  out.entries = lines(room * sizeof(OctetEntry));
  out.shuffled = lines(room * sizeof(uint16_t));
  return out;
}

// s [8] = 8 slots [8, block] times a row of x [block], times their scales.
inline void multiply_plain(const int8_t* codes, int64_t block, const int8_t* x, const float* scale,
                           float* s) {
  for (int i = 0; i < 8; ++i, codes += block) {
    int32_t sum = 0;
    for (int64_t k = 0; k < block; ++k) {
      sum += static_cast<int16_t>(codes[k]) * static_cast<int16_t>(x[k]);
    }
    s[i] = static_cast<float>(sum) * scale[i];
  }
}

#if defined(RPG_DOT_PRODUCTS)

// Lane j of the result is the sum of all lanes of x[j].
template <int LANES>
inline Pairs<8> sum_words(const Pairs<LANES> (&x)[8]) {
  Pairs<8> y[8];
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    if constexpr (LANES == 16) {
      alignas(64) int32_t lanes[16];
      std::memcpy(lanes, x + j, sizeof lanes);
      y[j] = load_words<8>(lanes) + load_words<8>(lanes + 8);
    } else {
      y[j] = x[j];
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    y[j] = RPG_SHUFFLE8(y[j], y[j + 4], 0, 1, 2, 3, 8, 9, 10, 11) +
           RPG_SHUFFLE8(y[j], y[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    y[j] = RPG_SHUFFLE8(y[j], y[j + 2], 0, 1, 8, 9, 4, 5, 12, 13) +
           RPG_SHUFFLE8(y[j], y[j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  return RPG_SHUFFLE8(y[0], y[1], 0, 8, 2, 10, 4, 12, 6, 14) +
         RPG_SHUFFLE8(y[0], y[1], 1, 9, 3, 11, 5, 13, 7, 15);
}

// As multiply_plain, by dots of LANES words. `first` is -128 Σ x, which makes up for codes that are
// unsigned here (int8_products.h).
template <int LANES>
inline void multiply_octet(const int8_t* codes, int64_t block, const int8_t* x, int32_t first,
                           const float* scale, float* s) {
  Pairs<LANES> sum[8] = {};
  for (int64_t k = 0; k < block; k += 4 * LANES) {
    const Pairs<LANES> xk = load_words<LANES>(x + k);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const Pairs<LANES> element = load_words<LANES>(codes + i * block + k) ^ kTopBits;
      Pairs<LANES> total = sum[i];
      __asm__("vpdpbusd %2, %1, %0" : "+v"(total) : "v"(element), "v"(xk));
      sum[i] = total;
    }
  }
  const Pairs<8> sums = sum_words<LANES>(sum) + first;
  store<8>(s, __builtin_convertvector(sums, Floats<8>) * load<8>(scale));
}

#endif

#if defined(RPG_INT8_TILES)

// s [2, M, 8] = sums [16, M] of two octets of slots, times their scales.
template <int M>
inline void scale_few(const int32_t* sums, const float* scale, float* s) {
  typedef FloatsOf<16>::integers Integers;
  if constexpr (M == 1) {
    store<16>(s, __builtin_convertvector(load_words<16>(sums), Floats<16>) * load<16>(scale));
    return;
  }
  for (int octet = 0; octet < 2; ++octet, sums += 8 * M, scale += 8, s += 8 * M) {
    const Floats<8> eight = load<8>(scale);
    alignas(64) float twice[16];
    store<8>(twice, eight), store<8>(twice + 8, eight);
    const Floats<16> factor = load<16>(twice);
    const Integers low = load_words<16>(sums);
    if constexpr (M == 2) {
      const Integers turned =
          RPG_SHUFFLE16(low, low, 0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
      store<16>(s, __builtin_convertvector(turned, Floats<16>) * factor);
    } else {
      const Integers high = load_words<16>(sums + 16);
      const Integers first =
          RPG_SHUFFLE16(low, high, 0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
      const Integers second =
          RPG_SHUFFLE16(low, high, 2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31);
      store<16>(s, __builtin_convertvector(first, Floats<16>) * factor);
      store<16>(s + 16, __builtin_convertvector(second, Floats<16>) * factor);
    }
  }
}

// s [rows / 8, M, 8] by tiles; rows are a multiple of 16, x words [block / 4, M]. Sums of 16 slots
// are scaled when those of the next are on their way.
template <int M, int STEPS>
inline void multiply_few_by_tiles(const int8_t* codes, int64_t rows, int64_t block,
                                  const uint32_t* x, const float* scale, float* s) {
  alignas(64) int32_t sums[2][kTileRows * M];
  constexpr int64_t kPitch = sizeof(int32_t) * M;
  load_tiles_of_b<1, STEPS>(x, kPitch);
  for (int64_t r = 0; r < rows; r += kTileRows) {
    multiply_slots<1, STEPS>(codes + r * block, block, sums[r / kTileRows % 2], kPitch);
    if (!r) continue;
    const int64_t done = r - kTileRows;
    scale_few<M>(sums[done / kTileRows % 2], scale + done, s + done * M);
  }
  const int64_t done = rows - kTileRows;
  scale_few<M>(sums[done / kTileRows % 2], scale + done, s + done * M);
}

#endif

class UnitLinearInt8Few {
 public:
  UnitLinearInt8Few(const LayerLaw& law, const Int8LinearArgs& args)
      : law_(law),
        args_(args),
        plan_(law),
        layout_(layout_of(law, plan_, args)),
        ring_{args.bank, int64_t{law.slots}, law.granularity} {
    const Activations x{args.x_dtype, args.x};
    for (int64_t m = 0; m < args.batch; ++m) {
      rounding_[m] = rounding_of(x.dtype, x.element(m * args.columns), args.columns);
    }
  }

  void run() const {
#pragma omp parallel num_threads(args_.threads)
    {
#pragma omp for schedule(static)
      for (int part = 0; part < args_.threads; ++part) {
        switch (args_.lanes) {
          case 1: add_columns<1>(part); break;
          case 2: add_columns<2>(part); break;
          default: add_columns<4>(part); break;
        }
      }
#pragma omp for schedule(static)
      for (int part = 0; part < args_.threads; ++part) write(part);
    }
  }

 private:
  struct Int8FewMemory {
    int8_t *x, *codes;
    uint32_t* words;
    float *s, *y, *scales;
    OctetEntry* entries;
    uint16_t* shuffled;
  };

  Int8FewMemory memory_of(int part) const {
    Carver carver(args_.workspace, part * layout_.bytes());
    Int8FewMemory out{};
    carver.take(out.x, layout_.x), carver.take(out.words, layout_.words);
    carver.take(out.s, layout_.s), carver.take(out.y, layout_.y);
    carver.take(out.codes, layout_.codes), carver.take(out.scales, layout_.scales);
    carver.take(out.entries, layout_.entries), carver.take(out.shuffled, layout_.shuffled);
    return out;
  }

  // x_b [M, block], zeros where it ends before, and as words [block / 4, M] for tiles; returns
  // -128 Σ x_b of each row.
  template <int M>
  void load_x(const Int8FewMemory& memory, int64_t column, int32_t (&first)[kMostFew]) const {
    const int64_t block = law_.granularity, first_column = column * block;
    const int64_t valid = std::min(args_.columns - first_column, block);
    const Activations x{args_.x_dtype, args_.x};
    for (int m = 0; m < M; ++m) {
      int8_t* target = memory.x + m * block;
      const bool is_row = m < args_.batch;
      round_row(x.dtype, x.element(m * args_.columns + first_column), is_row ? valid : 0,
                is_row ? rounding_[m] : RowRounding{}, block, target);
      int32_t sum = 0;
      for (int64_t k = 0; k < block; ++k) sum += target[k];
      first[m] = -128 * sum;
    }
    turn_words(memory.x, block, M, memory.words);
  }

  template <int M>
  void add_columns(int part) const {
    const Int8FewMemory memory = memory_of(part);
    const int64_t columns = plan_.band.columns;
    const int64_t low = columns * part / args_.threads, high = columns * (part + 1) / args_.threads;
    if (low == high) return;
#if defined(RPG_INT8_TILES)
    std::optional<ShapedTiles> tiles;
    if (args_.products == Int8Products::kTiles) {
      tiles.emplace(std::min(law_.granularity, kTileBytes), M);
    }
#endif
    std::memset(memory.y, 0, layout_.y);
    for (int64_t column = low; column < high; ++column) {
      int32_t first[kMostFew];
      load_x<M>(memory, column, first);
      for (uint32_t group = 0; group < plan_.band.groups; ++group) {
        const PlannedUnit& planned = plan_.unit_of(group, static_cast<uint32_t>(column));
        multiply_window<M>(memory, planned.window, first);
        unit_entries(plan_.band, planned.unit, planned.window, memory.entries, memory.shuffled);
        add_octets<M>(memory.entries, group_size(plan_.band, group), memory.s,
                      residues_of(plan_.band),
                      memory.y + int64_t{first_octet(plan_.band, group)} * kOctet * M);
      }
    }
  }

  template <int M>
  void multiply_window(const Int8FewMemory& memory, const UnitWindow& window,
                       [[maybe_unused]] const int32_t (&first)[kMostFew]) const {
    const int64_t block = law_.granularity, rows = int64_t{window.octets} * kOctet;
    const auto [codes, scales] =
        window_codes(ring_, window.base, rows, memory.codes, memory.scales);
#if defined(RPG_INT8_TILES)
    if (args_.products == Int8Products::kTiles) {
      const int64_t padded = padded_rows(rows);
      if (block > kTileBytes) {
        multiply_few_by_tiles<M, 2>(codes, padded, block, memory.words, scales, memory.s);
      } else {
        multiply_few_by_tiles<M, 1>(codes, padded, block, memory.words, scales, memory.s);
      }
      return;
    }
#endif
    for (int64_t r = 0; r < rows; r += kOctet) {
      for (int m = 0; m < M; ++m) {
        const int8_t *slots = codes + r * block, *x = memory.x + m * block;
        float* s = memory.s + r * M + m * kOctet;
#if defined(RPG_DOT_PRODUCTS)
        if (args_.products == Int8Products::kDots) {
          if (block > 32) {
            multiply_octet<16>(slots, block, x, first[m], scales + r, s);
          } else {
            multiply_octet<8>(slots, block, x, first[m], scales + r, s);
          }
          continue;
        }
#endif
        multiply_plain(slots, block, x, scales + r, s);
      }
    }
  }

  // This part's share of the rows, of which every part has summed some columns.
  void write(int part) const {
    const int64_t octets = plan_.band.octets, columns = plan_.band.columns, lanes = args_.lanes;
    const int64_t threads = args_.threads, size = element_bytes(args_.x_dtype);
    std::vector<const float*> sums;
    for (int64_t peer = 0; peer < threads; ++peer) {
      if (columns * peer / threads < columns * (peer + 1) / threads) {
        sums.push_back(memory_of(static_cast<int>(peer)).y);
      }
    }
    const Floats<8> scale = splat<8>(static_cast<float>(args_.scale));
    for (int64_t i = octets * part / threads; i < octets * (part + 1) / threads; ++i) {
      const int64_t row = i * kOctet;
      const int valid = static_cast<int>(std::min<int64_t>(law_.rows - row, kOctet));
      alignas(32) float bias[8] = {}, out[8];
      if (args_.bias) std::memcpy(bias, args_.bias + row, sizeof(float) * valid);
      for (int64_t m = 0; m < args_.batch; ++m) {
        Floats<8> total = load<8>(sums[0] + (i * lanes + m) * 8);
        for (size_t k = 1; k < sums.size(); ++k) total += load<8>(sums[k] + (i * lanes + m) * 8);
        total *= splat<8>(rounding_[m].step);
        store<8>(out, total * scale + load<8>(bias));
        write_some(args_.x_dtype, out, valid,
                   static_cast<char*>(args_.y) + (m * law_.rows + row) * size);
      }
    }
  }

  const LayerLaw& law_;
  const Int8LinearArgs& args_;
  UnitPlan plan_;
  Int8FewLayout layout_;
  CodeRing ring_;
  RowRounding rounding_[kMostFew] = {};
};

}  // namespace

Workspace unit_linear_int8_few_workspace(const LayerLaw& law, const Int8LinearArgs& args) {
  const UnitPlan plan(law);
  const Int8FewLayout layout = layout_of(law, plan, args);
  return {args.threads * layout.bytes() + plan.bytes(), args.threads * (layout.x + layout.words)};
}

void unit_linear_int8_few(const LayerLaw& law, const Int8LinearArgs& args) {
  UnitLinearInt8Few(law, args).run();
}

}  // namespace rpg::RPG_ISA
