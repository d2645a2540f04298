// unpack: Ŵ's blocks [positions, block] = scale · G · ring [slots, block], and its adjoint
// pack: grad [slots, block] += scale · Gᵀ · dense [positions, block].
//
// kLanes positions at a time: their slots and sign words (vector instructions), then one block
// after the other is copied or added with its signs. A block is BLOCK elements, or a multiple of 32
// for BLOCK = 0. Bytes moved per position and element: one read of the ring, which is meant to lie
// in cache, and one write of out (pack: a read of dense, a read and a write of grad). Where rows
// are cut within blocks (region.h), those go through a buffer. Rounding: unpack rounds scale · w
// once to the element type; pack rounds scale · x to the type of grad and adds in the order of
// positions, whatever the number of threads.

#include <type_traits>

#include "cpu/bank.h"
#include "cpu/kernels.h"

namespace rpg::RPG_ISA {

namespace {

constexpr int kLanes = 64;
constexpr int kPicked = 256;
constexpr int kMaxBlock = 128;
constexpr int64_t kSerial = 1 << 14;  // elements below which threads cost more than they bring

template <class T>
typename T::Compute signed_scale(double scale, bool negative) {
  return static_cast<typename T::Compute>(negative ? -scale : scale);
}

// Applies the signs in a word to the first COUNT elements that it covers. 16-bit elements go in
// pairs, whose two signs one shift of the word puts in place.
template <int COUNT>
inline void flip(uint16_t* x, uint32_t word) {
  if (COUNT == 1) {
    x[0] ^= static_cast<uint16_t>((word >> 15 & 1) << 15);
    return;
  }
#pragma omp simd
  for (int p = 0; p < COUNT / 2; ++p) {
    uint32_t pair;
    std::memcpy(&pair, x + 2 * p, sizeof pair);
    pair ^= (word << p) & 0x80008000u;
    std::memcpy(x + 2 * p, &pair, sizeof pair);
  }
}

// By how much the sign bit of element e is shifted to become the highest; a table, since vector
// instructions load it.
const uint32_t kToTop[32] = {16, 0, 17, 1, 18, 2,  19, 3,  20, 4,  21, 5,  22, 6,  23, 7,
                             24, 8, 25, 9, 26, 10, 27, 11, 28, 12, 29, 13, 30, 14, 31, 15};

template <int COUNT>
inline void flip(uint32_t* x, uint32_t word) {
#pragma omp simd
  for (int e = 0; e < COUNT; ++e) x[e] ^= (word << kToTop[e]) & 0x80000000u;
}

template <int COUNT>
inline void flip(uint64_t* x, uint32_t word) {
#pragma omp simd
  for (int e = 0; e < COUNT; ++e) {
    x[e] ^= static_cast<uint64_t>((word << kToTop[e]) & 0x80000000u) << 32;
  }
}

// out = scale · ring of COUNT elements; `word` holds their signs when SIGNS, otherwise `scale` has
// that of the block.
template <class T, int COUNT, bool SIGNS>
inline void copy(const typename T::Bits* __restrict ring, typename T::Bits* __restrict out,
                 typename T::Compute scale, bool exact, uint32_t word) {
  if (exact) {  // scale is 1 or -1
    const typename T::Bits mask = scale < 0 ? T::kSign : 0;
#pragma omp simd
    for (int e = 0; e < COUNT; ++e) out[e] = ring[e] ^ mask;
  } else {
#pragma omp simd
    for (int e = 0; e < COUNT; ++e) out[e] = T::store(T::load(ring[e]) * scale);
  }
  if (SIGNS) flip<COUNT>(out, word);
}

template <class T, int COUNT, bool SIGNS>
inline void add(const typename T::Bits* __restrict dense, typename T::Compute* __restrict grad,
                typename T::Compute scale, uint32_t word) {
  typename T::Bits x[COUNT];
#pragma omp simd
  for (int e = 0; e < COUNT; ++e) x[e] = dense[e];
  if (SIGNS) flip<COUNT>(x, word);
#pragma omp simd
  for (int e = 0; e < COUNT; ++e) grad[e] += T::load(x[e]) * scale;
}

// Slots and signs of the next positions: what a lane loop needs.
template <bool SIGNS>
struct Group {
  uint32_t slot[kLanes];
  uint32_t word[SIGNS ? kMaxWords : 1][kLanes];
  int size;

  void evaluate(Cursor& cursor, int64_t left, Reflect reflect, int words) {
    uint32_t position[kLanes];
    size = cursor.next(left, position, slot);
    if (SIGNS) {
      for (int w = 0; w < words; ++w) cursor.sign_words(w, position, word[w]);
    } else if (reflect == Reflect::kVector) {
      cursor.sign_words(0, position, word[0]);
    } else {
      for (int l = 0; l < kLanes; ++l) word[0][l] = 0;
    }
  }
};

template <class T, int BLOCK, bool SIGNS>
inline void copy_block(const typename T::Bits* ring, typename T::Bits* out,
                       typename T::Compute scale, bool exact, int block, const uint32_t* words) {
  if (BLOCK) {
    copy<T, BLOCK ? BLOCK : 1, SIGNS>(ring, out, scale, exact, words[0]);
  } else {
    for (int e = 0; e < block; e += 32) {
      copy<T, 32, SIGNS>(ring + e, out + e, scale, exact, SIGNS ? words[e / 32 * kLanes] : 0);
    }
  }
}

// Whether blocks follow each other in memory.
inline bool whole(const Region& region, const Cut& cut, int block) {
  return cut.first == 0 && cut.length == region.count * block;
}

// The block at a position of dense [rows · runs, length], by a buffer where it is cut.
template <class Bits>
inline const Bits* block_at(const Bits* dense, const Region& region, const Cut& cut,
                            int64_t position, int block, Bits* buffer) {
  const CutBlock in_memory = cut_block(region, cut, position, block);
  if (in_memory.high - in_memory.low == block) return dense + in_memory.begin;
  std::memset(buffer, 0, sizeof(Bits) * block);
  std::memcpy(buffer + in_memory.low, dense + in_memory.begin,
              sizeof(Bits) * (in_memory.high - in_memory.low));
  return buffer;
}

// A slot of a bank that is not plain, rounded to T: its own or in `buffer`.
template <class T>
inline const typename T::Bits* stored_slot(const Ring& ring, int64_t slot,
                                           typename T::Bits* buffer) {
  if (!ring.has(slot)) {
    std::memset(buffer, 0, sizeof(typename T::Bits) * ring.block);
    return buffer;
  }
  if (!ring.scales) return reinterpret_cast<const typename T::Bits*>(ring.find(slot));
  alignas(64) float values[kMaxBlock];
  read_slot(ring, slot, ring.block, values);
  for (int e = 0; e < ring.block; ++e) {
    buffer[e] = T::store(static_cast<typename T::Compute>(values[e]));
  }
  return buffer;
}

template <class T, int BLOCK, bool SIGNS, bool PLAIN>
void unpack_slots(const LayerLaw& law, const UnpackArgs& args) {
  using Bits = typename T::Bits;
  const Region region = merged(law, args.region);
  const int64_t positions = positions_of(region);
  const int block = BLOCK ? BLOCK : law.granularity;
  const int words = words_of(law);
  const Ring ring{args.bank, int64_t{law.slots}, block};
  const Bits* values = static_cast<const Bits*>(args.bank.data);
  Bits* out = static_cast<Bits*>(args.out);
  const bool exact = args.scale == 1.0, uncut = whole(args.region, args.cut, block);
  const typename T::Compute scales[2] = {signed_scale<T>(args.scale, false),
                                         signed_scale<T>(args.scale, true)};
  const int threads = positions * block < kSerial ? 1 : args.threads;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int part = 0; part < threads; ++part) {
    int64_t position = positions * part / threads;
    const int64_t end = positions * (part + 1) / threads;
    Cursor cursor(law, region, position);
    Group<SIGNS> group;
    for (; position < end; position += group.size) {
      group.evaluate(cursor, end - position, law.reflect, words);
      for (int l = 0; l < group.size; ++l) {
        Bits of_slot[PLAIN ? 1 : kMaxBlock];
        const Bits* stored = PLAIN ? values + static_cast<int64_t>(group.slot[l]) * block
                                   : stored_slot<T>(ring, group.slot[l], of_slot);
        const auto scale = scales[SIGNS ? 0 : group.word[0][l] >> 31];
        const uint32_t* words_of_block = &group.word[0][l];
        const CutBlock in_memory = uncut ? CutBlock{(position + l) * block, 0, block}
                                         : cut_block(args.region, args.cut, position + l, block);
        if (in_memory.high - in_memory.low == block) {
          copy_block<T, BLOCK, SIGNS>(stored, out + in_memory.begin, scale, exact, block,
                                      words_of_block);
        } else {
          Bits buffer[kMaxBlock];
          copy_block<T, BLOCK, SIGNS>(stored, buffer, scale, exact, block, words_of_block);
          std::memcpy(out + in_memory.begin, buffer + in_memory.low,
                      sizeof(Bits) * (in_memory.high - in_memory.low));
        }
      }
    }
  }
}

template <class T, int BLOCK, bool SIGNS>
void unpack_blocks(const LayerLaw& law, const UnpackArgs& args) {
  if (args.bank.plain()) return unpack_slots<T, BLOCK, SIGNS, true>(law, args);
  unpack_slots<T, BLOCK, SIGNS, false>(law, args);
}

template <class T, int BLOCK, bool SIGNS>
inline void add_block(const typename T::Bits* dense, typename T::Compute* grad,
                      typename T::Compute scale, int block, const uint32_t* words, int stride) {
  if (BLOCK) {
    add<T, BLOCK ? BLOCK : 1, SIGNS>(dense, grad, scale, words[0]);
  } else {
    for (int e = 0; e < block; e += 32) {
      add<T, 32, SIGNS>(dense + e, grad + e, scale, SIGNS ? words[e / 32 * stride] : 0);
    }
  }
}

// One thread adds position by position. Several first tabulate slots and words of as many
// positions as the workspace holds; then each adds those that fall into its own range of slots.
template <class T, int BLOCK, bool SIGNS>
void pack_blocks(const LayerLaw& law, const PackArgs& args) {
  using Compute = typename T::Compute;
  const Region region = merged(law, args.region);
  const int64_t positions = positions_of(region);
  const int block = BLOCK ? BLOCK : law.granularity;
  const int words = SIGNS ? words_of(law) : 1;
  const auto* dense = static_cast<const typename T::Bits*>(args.dense);
  Compute* grad = static_cast<Compute*>(args.grad);
  const bool uncut = whole(args.region, args.cut, block);
  const auto block_of = [&](int64_t position, typename T::Bits* buffer) {
    return uncut ? dense + position * block
                 : block_at(dense, args.region, args.cut, position, block, buffer);
  };
  const Compute scales[2] = {signed_scale<T>(args.scale, false), signed_scale<T>(args.scale, true)};
  const int64_t step = args.workspace_entries / (1 + words) / kLanes * kLanes;
  if (args.threads == 1 || positions * block < kSerial || step == 0) {
    Cursor cursor(law, region, 0);
    Group<SIGNS> group;
    for (int64_t position = 0; position < positions; position += group.size) {
      group.evaluate(cursor, positions - position, law.reflect, words);
      for (int l = 0; l < group.size; ++l) {
        typename T::Bits buffer[kMaxBlock];
        add_block<T, BLOCK, SIGNS>(
            block_of(position + l, buffer), grad + static_cast<int64_t>(group.slot[l]) * block,
            scales[SIGNS ? 0 : group.word[0][l] >> 31], block, &group.word[0][l], kLanes);
      }
    }
    return;
  }
  uint32_t* const slot = args.workspace;         // [step]
  uint32_t* const word = args.workspace + step;  // [step, words]
  const int threads = args.threads;
#pragma omp parallel num_threads(threads)
  for (int64_t begin = 0; begin < positions; begin += step) {
    const int64_t size = positions - begin < step ? positions - begin : step;
#pragma omp for schedule(static)
    for (int part = 0; part < threads; ++part) {
      int64_t offset = size * part / threads;
      const int64_t end = size * (part + 1) / threads;
      Cursor cursor(law, region, begin + offset);
      Group<SIGNS> group;
      for (; offset < end; offset += group.size) {
        group.evaluate(cursor, end - offset, law.reflect, words);
        for (int l = 0; l < group.size; ++l) {
          slot[offset + l] = group.slot[l];
          for (int w = 0; w < words; ++w) word[(offset + l) * words + w] = group.word[w][l];
        }
      }
    }
#pragma omp for schedule(static)
    for (int part = 0; part < threads; ++part) {
      const uint32_t low = static_cast<uint32_t>(uint64_t{law.slots} * part / threads);
      const uint32_t high = static_cast<uint32_t>(uint64_t{law.slots} * (part + 1) / threads);
      for (int64_t first = 0; first < size; first += kPicked) {
        const int count = static_cast<int>(size - first < kPicked ? size - first : kPicked);
        int picked[kPicked];
        int found = 0;  // picked without a branch: half of them would be predicted wrongly
        for (int k = 0; k < count; ++k) {
          picked[found] = k;
          found += slot[first + k] - low < high - low;
        }
        for (int i = 0; i < found; ++i) {
          const int64_t k = first + picked[i];
          typename T::Bits buffer[kMaxBlock];
          add_block<T, BLOCK, SIGNS>(
              block_of(begin + k, buffer), grad + static_cast<int64_t>(slot[k]) * block,
              scales[SIGNS ? 0 : word[k * words] >> 31], block, word + k * words, 1);
        }
      }
    }
  }
}

// The instance for a dtype, a block and whether every element has a sign of its own.
template <class T, bool SIGNS, class Args>
void by_block(const LayerLaw& law, const Args& args) {
#define RPG_BLOCK(BLOCK)                            \
  if constexpr (std::is_same_v<Args, PackArgs>)     \
    return pack_blocks<T, BLOCK, SIGNS>(law, args); \
  else                                              \
    return unpack_blocks<T, BLOCK, SIGNS>(law, args);
  switch (law.granularity) {
    case 1: RPG_BLOCK(1)
    case 2: RPG_BLOCK(2)
    case 4: RPG_BLOCK(4)
    case 8: RPG_BLOCK(8)
    case 16: RPG_BLOCK(16)
    default: RPG_BLOCK(0)
  }
#undef RPG_BLOCK
}

template <class T, class Args>
void by_reflect(const LayerLaw& law, const Args& args) {
  if (law.reflect == Reflect::kElement) {
    by_block<T, true>(law, args);
  } else {
    by_block<T, false>(law, args);
  }
}

template <class Args>
void by_dtype(const LayerLaw& law, const Args& args) {
  switch (args.dtype) {
    case Dtype::kFloat64: return by_reflect<Float64>(law, args);
    case Dtype::kFloat32: return by_reflect<Float32>(law, args);
    case Dtype::kBfloat16: return by_reflect<Bfloat16>(law, args);
    case Dtype::kFloat16: return by_reflect<Float16>(law, args);
    case Dtype::kInt8: return;  // of codes alone
  }
}

}  // namespace

void unpack(const LayerLaw& law, const UnpackArgs& args) { by_dtype(law, args); }

void pack(const LayerLaw& law, const PackArgs& args) { by_dtype(law, args); }

}  // namespace rpg::RPG_ISA
