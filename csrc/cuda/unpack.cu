// unpack: Ŵ [N, K] = scale · G ring. pack: dw [slots, block] = scale · Gᵀ dŴ [N, K], its adjoint.
//
// Both move a block at a time, 16 lanes to a block, so that a warp reads and writes whole lines.
// Bytes: Ŵ or dŴ once, a block of the bank for each of its uses or once; nothing else.
//
// unpack: 256 threads take 256 neighbouring blocks of the output. Each computes the slot of one,
// puts it into shared memory (256 · 4 bytes, all there is), and then lanes copy: 25 instructions of
// a block's 16 lanes, which is 8 for a weight of blocks of 64.
//
// pack: 16 lanes own a slot and add up all of its uses, which the inverse law gives, in the order
// of addresses: no atomics, the same bits every time, no shared memory. Each lane inverts one use,
// then all read them in turn.

#include "cuda/columns.h"
#include "cuda/unpack.h"
#include "law/layer.h"
#include "law/positions.h"

namespace rpg::RPG_DEVICE {

namespace {

constexpr int kLanes = 16;  // of a block
constexpr int kGroups = kThreads / kLanes;

// One band of a layer.
struct UnpackKernelArgs {
  Layer layer;
  const void* ring;  // [slots, block]
  void* out;         // [rows of the band, K]
  float scale;
  bool aligned;  // lanes' elements of out, at multiples of their size, none behind a row
};

struct PackKernelArgs {
  Layer layer;
  const void* dense;  // [rows of the band, K]
  float* grad;        // [slots, block]
  float scale;
  bool add;      // to what another band left
  bool aligned;  // as of unpack
};

// The sign of element e of a block in bit 31. `word` is the sign word that has e.
RPG_FUNCTION uint32_t element_sign(const Layer& layer, uint32_t word, int e) {
  if (layer.reflect == Reflect::kNone) return 0;
  return layer.reflect == Reflect::kVector ? word & 0x80000000u : word >> sign_bit(e) << 31;
}

template <class T, int BLOCK>
RPG_KERNEL(kThreads, 2)
unpack_kernel(RPG_ARGS UnpackKernelArgs args) {
  using Bits = typename T::Bits;
  constexpr int kLaneElements = BLOCK / kLanes;  // elements of a lane
  const Layer& layer = args.layer;
  const int64_t total = int64_t{layer.rows} * layer.blocks;
  const int64_t first = int64_t{cta_x()} * kThreads;
  const Shared<uint32_t> slots(0, kThreads);
  if (first + thread() < total) {
    const int n = static_cast<int>((first + thread()) / layer.blocks);
    const int b = static_cast<int>((first + thread()) - int64_t{n} * layer.blocks);
    slots[thread()] = ring_slot(layer, position(layer, n, b));
  }
  sync();
  const int lane = thread() % kLanes, e0 = lane * kLaneElements;
  const int count = static_cast<int>(total - first < kThreads ? total - first : kThreads);
  for (int i = thread() / kLanes; i < count; i += kGroups) {
    const int n = static_cast<int>((first + i) / layer.blocks);
    const int b = static_cast<int>((first + i) - int64_t{n} * layer.blocks);
    const uint32_t p = position(layer, n, b);
    const int w = layer.reflect == Reflect::kElement ? e0 / 32 : 0;
    const uint32_t word = layer.reflect == Reflect::kNone ? 0 : sign_word(layer, w, p);
    const Bits* stored = static_cast<const Bits*>(args.ring) + int64_t{slots[i]} * BLOCK + e0;
    const int column = b * BLOCK + e0, left = layer.columns - column;
    Bits* target = static_cast<Bits*>(args.out) + int64_t{n} * layer.columns + column;
    auto bits = load<Vector<Bits, kLaneElements>>(stored);
    RPG_UNROLL
    for (int e = 0; e < kLaneElements; ++e) {
      const uint32_t value = as_bits(T::load(bits.value[e]) * args.scale);
      bits.value[e] = T::store(as_float(value ^ element_sign(layer, word, e0 + e)));
    }
    if (args.aligned) {
      if (left > 0) store(target, bits);
      continue;
    }
    RPG_UNROLL
    for (int e = 0; e < kLaneElements; ++e) {
      if (e < left) target[e] = bits.value[e];
    }
  }
}

// A row and a column.
struct RowAndColumn {
  int n, b;
};

// The inverse of `position`; n may lie in the padding behind the last row.
RPG_FUNCTION RowAndColumn at_position(const Layer& layer, uint32_t p) {
  const uint32_t size = layer.units ? layer.unit.octets * 8 : static_cast<uint32_t>(layer.blocks);
  const int major = static_cast<int>(p / size), minor = static_cast<int>(p % size);
  return layer.units ? RowAndColumn{minor, major} : RowAndColumn{major, minor};
}

// One of the uses of a slot, which are numbered in the order of addresses: its position, or that
// there is no such use.
struct Use {
  uint32_t p;
  bool valid;
};

RPG_CALLED Use use_of(const Layer& layer, uint32_t slot, int64_t use) {
  if (!layer.units) {
    const BandLaw& law = layer.ring;
    const int64_t q = sub_mod(slot, law.base, layer.slots) + use * layer.slots;
    if (q >= int64_t{layer.rows} * layer.blocks) return {0, false};
    uint32_t p[1] = {static_cast<uint32_t>(q)};
    if (law.permute) unpermute(law.permutation, p);
    return {p[0], true};
  }
  // In each pass along the ring one octet has the slot, and all of the octet's uses read it.
  const UnitBand& law = layer.unit;
  const int64_t laps = law.by_laps.divisor;
  const int64_t place = sub_mod(slot, law.base, layer.slots) + use / laps * layer.slots;
  const int64_t of_band = place / 8 * laps + use % laps;
  const int64_t end = law.offset + int64_t{law.columns} * law.by_column.divisor;
  if (of_band < law.offset || of_band >= end) return {0, false};
  const uint32_t p = position_of_use(law, static_cast<uint32_t>(of_band), place % 8);
  return {p, at_position(layer, p).n < layer.rows};  // not padding
}

// How many uses a slot may have; `use_of` says which of them there are.
RPG_FUNCTION int64_t uses_of(const Layer& layer) {
  const int64_t slots = layer.slots;
  if (!layer.units) return (int64_t{layer.rows} * layer.blocks + slots - 1) / slots;
  const int64_t places = int64_t{8} * ring_octets(layer.unit);
  return (places + slots - 1) / slots * layer.unit.by_laps.divisor;
}

template <class T, int BLOCK>
RPG_KERNEL(kThreads, 2)
pack_kernel(RPG_ARGS PackKernelArgs args) {
  using Bits = typename T::Bits;
  constexpr int kLaneElements = BLOCK / kLanes;
  const Layer& layer = args.layer;
  const int64_t slots = layer.slots;
  const int lane = thread() % kLanes, e0 = lane * kLaneElements,
            group = thread() % kWarp / kLanes * kLanes;
  const int64_t slot = int64_t{cta_x()} * kGroups + thread() / kLanes;
  const int64_t uses = uses_of(layer);
  const bool aligned = args.aligned;
  float sum[kLaneElements] = {};
  // All lanes of a warp go on, since they exchange what they inverted.
  for (int64_t first = 0; first < uses; first += kLanes) {
    Use own_use = {0, false};
    if (slot < slots && first + lane < uses) {
      own_use = use_of(layer, static_cast<uint32_t>(slot), first + lane);
    }
    for (int k = 0; k < kLanes; ++k) {
      const uint32_t p = shuffle(own_use.p, group + k);
      const bool valid = shuffle(own_use.valid, group + k);
      if (!valid) continue;
      const RowAndColumn place = at_position(layer, p);
      const int w = layer.reflect == Reflect::kElement ? e0 / 32 : 0;
      const uint32_t word = layer.reflect == Reflect::kNone ? 0 : sign_word(layer, w, p);
      const int column = place.b * BLOCK + e0, left = layer.columns - column;
      const Bits* values =
          static_cast<const Bits*>(args.dense) + int64_t{place.n} * layer.columns + column;
      Vector<Bits, kLaneElements> bits{};
      if (aligned) {
        if (left > 0) bits = load<Vector<Bits, kLaneElements>>(values);
      } else {
        RPG_UNROLL
        for (int e = 0; e < kLaneElements; ++e) {
          if (e < left) bits.value[e] = values[e];
        }
      }
      RPG_UNROLL
      for (int e = 0; e < kLaneElements; ++e) {
        sum[e] += as_float(as_bits(T::load(bits.value[e])) ^ element_sign(layer, word, e0 + e));
      }
    }
  }
  if (slot >= slots) return;
  float* grad = args.grad + slot * BLOCK + e0;
  RPG_UNROLL
  for (int e = 0; e < kLaneElements; ++e) {
    const float value = sum[e] * args.scale;
    grad[e] = args.add ? grad[e] + value : value;
  }
}

template <class T, int BLOCK>
void run_unpack(const LayerLaw& law, const CudaUnpackArgs& args) {
  for (int64_t band = 0; band < bands_of(law); ++band) {
    UnpackKernelArgs kernel_args{};
    kernel_args.layer = layer_of(law, args.columns, band);
    kernel_args.ring = args.ring;
    const int64_t first = band * law.rows_per_band * args.columns;
    kernel_args.out = static_cast<typename T::Bits*>(args.out) + first;
    kernel_args.scale = static_cast<float>(args.scale);
    constexpr int kLaneElements = BLOCK / kLanes, kBytes = kLaneElements * sizeof(typename T::Bits);
    kernel_args.aligned =
        args.columns % kLaneElements == 0 && reinterpret_cast<uintptr_t>(args.out) % kBytes == 0;
    const int64_t total = int64_t{kernel_args.layer.rows} * kernel_args.layer.blocks;
    launch(unpack_kernel<T, BLOCK>, {static_cast<int>((total + kThreads - 1) / kThreads), 1, 1},
           kThreads, 4 * kThreads, args.stream, kernel_args);
  }
}

template <class T, int BLOCK>
void run_pack(const LayerLaw& law, const CudaPackArgs& args) {
  for (int64_t band = 0; band < bands_of(law); ++band) {
    PackKernelArgs kernel_args{};
    kernel_args.layer = layer_of(law, args.columns, band);
    const int64_t first = band * law.rows_per_band * args.columns;
    kernel_args.dense = static_cast<const typename T::Bits*>(args.dense) + first;
    kernel_args.grad = args.grad;
    kernel_args.scale = static_cast<float>(args.scale);
    kernel_args.add = band > 0;
    constexpr int kLaneElements = BLOCK / kLanes, kBytes = kLaneElements * sizeof(typename T::Bits);
    kernel_args.aligned =
        args.columns % kLaneElements == 0 && reinterpret_cast<uintptr_t>(args.dense) % kBytes == 0;
    const int64_t slots = law.slots;
    launch(pack_kernel<T, BLOCK>, {static_cast<int>((slots + kGroups - 1) / kGroups), 1, 1},
           kThreads, 0, args.stream, kernel_args);
  }
}

}  // namespace

void unpack(const LayerLaw& law, const CudaUnpackArgs& args) {
  const bool small = law.granularity == 32;
  switch (args.dtype) {
    case Dtype::kBfloat16:
      return small ? run_unpack<Bfloat16, 32>(law, args) : run_unpack<Bfloat16, 64>(law, args);
    case Dtype::kFloat16:
      return small ? run_unpack<Float16, 32>(law, args) : run_unpack<Float16, 64>(law, args);
    default: return small ? run_unpack<Float32, 32>(law, args) : run_unpack<Float32, 64>(law, args);
  }
}

void pack(const LayerLaw& law, const CudaPackArgs& args) {
  const bool small = law.granularity == 32;
  switch (args.dtype) {
    case Dtype::kBfloat16:
      return small ? run_pack<Bfloat16, 32>(law, args) : run_pack<Bfloat16, 64>(law, args);
    case Dtype::kFloat16:
      return small ? run_pack<Float16, 32>(law, args) : run_pack<Float16, 64>(law, args);
    default: return small ? run_pack<Float32, 32>(law, args) : run_pack<Float32, 64>(law, args);
  }
}

}  // namespace rpg::RPG_DEVICE
