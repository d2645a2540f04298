// linear_bank_grad: dw [slots, block] = scale · Gᵀ · (dy [batch, N]ᵀ x [batch, K]), for units.
//
//   T[slot, m] = Σ ± dy[n, m]                for the rows n of a unit that read a slot
//   dw[slot]  += Σ_m T[slot, m] x[m, b]      b the unit's column of blocks
//
// No dense gradient, no atomics. A CTA owns kOwned slots of the ring. Uses number the octets of the
// ring through all passes (docs/unit_law.md, section 4), so pass by pass it goes through the uses
// of its own octets in order, unit by unit. A thread takes a use: the inverse shuffle says which
// octet of rows has it, and a word in which order its rows read the octet. Then a thread for each
// slot adds up its rows, use by use: the order of additions is that of the law. The gradient stays
// in registers, kOwned / parts · 2 numbers of a thread, and is written once. Where the ring has
// fewer owners than the device has processors, several CTAs share an owner's passes, and the last
// of them adds their sums in order.
//
// Grid: owners x copies; 256 threads: pairs of elements x parts of the slots. Shared memory, and
// where it is with 4 laps:
//
//   from byte | bytes  | what               | layout
//   ----------|--------|--------------------|---------------------------------------------------
//           0 | 16,384 | T                  | [4 rows of the batch][256 slots][4] fp32
//      16,384 |  1,024 | read               | [256 slots]: whether a row of the unit reads it
//      17,408 |     64 | rounds of a unit   | [16], of its shuffle
//      17,472 |  2,112 | readers            | [33 octets, laps] of 16 bytes: who has their uses
//      19,584 |     16 | is this CTA last?  |
//
// Budget: none is counted (docs/cuda.md); registers are what limits it.

#include <stdexcept>

#include "cuda/columns.h"
#include "cuda/linear_grads.h"
#include "law/layer.h"
#include "law/positions.h"

namespace rpg::RPG_DEVICE {

namespace {

constexpr int kOwned = 256;              // slots
constexpr int kOctets = kOwned / 8 + 1;  // octets that have owned slots, at most
constexpr int kBatch = 16;               // rows of the batch at a time
constexpr int kPlanes = kBatch / 4;

// Which rows have a use of an octet of the ring.
struct alignas(16) Reader {
  uint32_t row;    // Row r of the octet of rows is row + r of the layer.
  uint32_t word;   // It reads residue_of(r, word) of the octet of the ring,
  uint32_t signs;  // with the sign of bit r.
};

struct BankGradKernelArgs {
  Layer layer;
  const void* dy;      // [batch, N]
  const void* x;       // [batch, K]
  float* dw;           // [slots, block]
  float* partial;      // [copies, slots, block]
  unsigned* counters;  // [owners]
  float scale;
  int batch;
  int copies;                       // So many CTAs share an owner's passes.
  int read, rounds, readers, last;  // Where these begin in shared memory, in bytes.
};

struct BankGradShared {
  Shared<float> t;         // [plane][kOwned][4]
  Shared<int> read;        // [kOwned]
  Shared<uint32_t> round;  // [kShuffleRounds]
  Shared<Reader> readers;  // [kOctets, laps]
};

RPG_FUNCTION int t_at(int plane, int slot) { return (plane * kOwned + slot) * 4; }

template <class T>
RPG_FUNCTION float element(const void* values, int64_t i) {
  return T::load(static_cast<const typename T::Bits*>(values)[i]);
}

// What a CTA takes of one unit: uses from `first` to `end`, counted from the first one of `octet`.
struct UnitUses {
  Unit unit;
  int column;      // The unit's column of blocks.
  uint32_t octet;  // The first octet that has owned slots, counted from the band's first.
  int place;       // The first owned slot in that octet; before it, where it is none of the band's.
  int first, end;
};

// Finds the rows that have the uses; visible after a barrier.
RPG_FUNCTION void find_readers(const Layer& layer, const UnitUses& uses,
                               const BankGradShared& memory) {
  const UnitBand& law = layer.unit;
  const uint32_t laps = law.by_laps.divisor;
  if (thread() < kShuffleRounds) {
    memory.round[thread()] = round_of(law, uses.unit.number, uses.unit.size, thread());
  }
  sync();
  RPG_LOOP
  for (int i = uses.first + thread(); i < uses.end; i += kThreads) {
    uint32_t x = uses.octet * laps + static_cast<uint32_t>(i) - uses.unit.use;
    if (law.permute) {
      RPG_UNROLL
      for (int j = kShuffleRounds - 1; j >= 0; --j) {
        x = shuffle_round(x, uses.unit.size, memory.round[j]);
      }
    }
    const uint32_t q = uses.unit.q + x;
    uint32_t signs = 0;
    if (layer.reflect == Reflect::kVector) {
      signs = hash_word(q / 4, law.sign_key[0], law.sign_key[1]) >> (q % 4 * 8);
    }
    // The word 0 gives each row its own residue.
    const uint32_t word = law.permute ? hash_word(q, law.octet_key[0], law.octet_key[1]) : 0;
    const uint32_t row = q % law.octets * kOctet;  // of its column
    store(memory.readers.span(i, 1), Reader{row, word, signs});
  }
}

// T of 16 rows of the batch from m0 on: a thread adds up what the rows have that read its slot.
template <class T>
RPG_FUNCTION void sum_rows(const BankGradKernelArgs& args, const UnitUses& uses, int owned, int m0,
                           const BankGradShared& memory) {
  static_assert(kOwned == kThreads, "a slot for each thread");
  if (thread() >= owned) return;
  const int laps = static_cast<int>(args.layer.unit.by_laps.divisor);
  const int place = uses.place + thread();
  int use = place < 0 ? uses.end : place / 8 * laps;
  const int end = use + laps < uses.end ? use + laps : uses.end;
  if (use < uses.first) use = uses.first;
  float sum[kBatch] = {};
  bool read = false;
  RPG_LOOP
  for (; use < end; ++use) {
    const auto reader = load<Reader>(memory.readers.span(use, 1));
    const uint32_t r = row_at(static_cast<uint32_t>(place) % 8, reader.word);
    const int n = static_cast<int>(reader.row + r);
    if (n >= args.layer.rows) continue;  // padding
    read = true;
    const float sign = sign_of(reader.signs >> r << 31);
    RPG_UNROLL
    for (int m = 0; m < kBatch; ++m) {
      if (m0 + m >= args.batch) continue;
      const int64_t index = int64_t{m0 + m} * args.layer.rows + n;
      sum[m] = fused(sign, element<T>(args.dy, index), sum[m]);
    }
  }
  RPG_UNROLL
  for (int plane = 0; plane < kPlanes; ++plane) {
    Vector<float, 4> v;
    RPG_UNROLL
    for (int k = 0; k < 4; ++k) v.value[k] = sum[4 * plane + k];
    store(memory.t.span(t_at(plane, thread()), 4), v);
  }
  memory.read[thread()] = read;
}

// Adds what the uses of a unit contribute.
template <class T, int BLOCK>
RPG_FUNCTION void add_unit(const BankGradKernelArgs& args, const UnitUses& uses, int owned,
                           const BankGradShared& memory,
                           float (&dw)[kOwned * BLOCK / 2 / kThreads][2]) {
  constexpr int kPairs = BLOCK / 2, kParts = kThreads / kPairs;
  const int pair = thread() % kPairs, part = thread() / kPairs;
  const int column = uses.column * BLOCK + 2 * pair;
  find_readers(args.layer, uses, memory);
  RPG_LOOP
  for (int m0 = 0; m0 < args.batch; m0 += kBatch) {
    sync();  // readers are there, T of the rows before was read
    sum_rows<T>(args, uses, owned, m0, memory);
    float x[kBatch][2];
    RPG_UNROLL
    for (int m = 0; m < kBatch; ++m) {
      const int64_t index = int64_t{m0 + m} * args.layer.columns + column;
      const bool valid = m0 + m < args.batch;
      x[m][0] = valid && column < args.layer.columns ? element<T>(args.x, index) : 0.f;
      x[m][1] = valid && column + 1 < args.layer.columns ? element<T>(args.x, index + 1) : 0.f;
    }
    sync();
    if (column >= args.layer.columns) continue;
    RPG_UNROLL
    for (int j = 0; j < kOwned / kParts; ++j) {
      const int slot = part + j * kParts;
      // 0 times an infinity of x need not be 0.
      if (slot >= owned || !memory.read[slot]) continue;
      RPG_UNROLL
      for (int plane = 0; plane < kPlanes; ++plane) {
        const auto v = load<Vector<float, 4>>(memory.t.span(t_at(plane, slot), 4));
        RPG_UNROLL
        for (int k = 0; k < 4; ++k) {
          dw[j][0] = fused(v.value[k], x[4 * plane + k][0], dw[j][0]);
          dw[j][1] = fused(v.value[k], x[4 * plane + k][1], dw[j][1]);
        }
      }
    }
  }
  sync();
}

// Calls visit(uses) for each unit that has uses of `owned` slots from `begin` on, in order. Slots
// are counted through all passes, from the first one of the band's first octet.
template <class Visit>
RPG_FUNCTION void visit_units(const UnitBand& law, int64_t begin, int owned, const Visit& visit) {
  if (begin + owned <= 0) return;
  const int64_t laps = law.by_laps.divisor, octets = ring_octets(law);
  const int64_t low = begin < 0 ? 0 : begin / 8, high = (begin + owned - 1) / 8 + 1;
  const int64_t band_end = law.offset + int64_t{law.columns} * law.by_column.divisor;
  int64_t use = low * laps, end = (high < octets ? high : octets) * laps;
  if (use < law.offset) use = law.offset;
  if (end > band_end) end = band_end;
  UnitUses uses{};
  uses.octet = static_cast<uint32_t>(low), uses.place = static_cast<int>(begin - 8 * low);
  RPG_LOOP
  while (use < end) {
    uses.unit = unit_with_use(law, static_cast<uint32_t>(use));
    uses.column = static_cast<int>(divide(uses.unit.q, law.by_column));
    uses.first = static_cast<int>(use - low * laps);
    use = int64_t{uses.unit.use} + uses.unit.size;
    if (use > end) use = end;
    uses.end = static_cast<int>(use - low * laps);
    visit(uses);
  }
}

template <class T, int BLOCK>
RPG_KERNEL(kThreads, 1)
linear_bank_grad_kernel(RPG_ARGS BankGradKernelArgs args) {
  constexpr int kPairs = BLOCK / 2, kParts = kThreads / kPairs;
  const UnitBand& law = args.layer.unit;
  const uint32_t slots = args.layer.slots;
  const uint32_t begin = static_cast<uint32_t>(cta_x()) * kOwned;
  const int owned = static_cast<int>(min_u32(kOwned, slots - begin));
  const BankGradShared memory{
      Shared<float>(0, kOwned * kBatch), Shared<int>(args.read, kOwned),
      Shared<uint32_t>(args.rounds, kShuffleRounds),
      Shared<Reader>(args.readers, kOctets * static_cast<int>(law.by_laps.divisor))};

  // The band's octets are slots base, base + 1 ... of all passes; this owner's come back every
  // pass.
  const int64_t passes = (law.base + int64_t{8} * ring_octets(law) + slots - 1) / slots;
  const int64_t low = passes * cta_y() / args.copies;
  const int64_t high = passes * (cta_y() + 1) / args.copies;
  float dw[kOwned / kParts][2] = {};
  for (int64_t pass = low; pass < high; ++pass) {
    visit_units(law, begin + pass * slots - law.base, owned,
                [&](const UnitUses& uses) { add_unit<T, BLOCK>(args, uses, owned, memory, dw); });
  }

  const int pair = thread() % kPairs, part = thread() / kPairs;
  float* const sums = args.copies == 1 ? args.dw : args.partial + int64_t{cta_y()} * slots * BLOCK;
  const float scale = args.copies == 1 ? args.scale : 1.f;
  RPG_UNROLL
  for (int j = 0; j < kOwned / kParts; ++j) {
    const int slot = part + j * kParts;
    if (slot >= owned) continue;
    float* const target = sums + (int64_t{begin} + slot) * BLOCK + 2 * pair;
    target[0] = dw[j][0] * scale;
    target[1] = dw[j][1] * scale;
  }
  if (args.copies == 1) return;
  if (!is_last(Shared<int>(args.last, 1), args.counters + cta_x(), args.copies)) return;
  RPG_LOOP
  for (int i = thread(); i < owned * BLOCK; i += kThreads) {
    const int64_t index = int64_t{begin} * BLOCK + i;
    args.dw[index] = args.scale * sum_of(args.partial + index, args.copies, int64_t{slots} * BLOCK);
  }
}

// Where things are in shared memory, and how much there is, in bytes.
struct BankGradLayout {
  int read, rounds, readers, last, bytes;
};

BankGradLayout layout_of(uint32_t laps) {
  BankGradLayout out{};
  out.read = 4 * kOwned * kBatch;
  out.rounds = out.read + 4 * kOwned;
  out.readers = out.rounds + 4 * kShuffleRounds;
  out.last = out.readers + kOctets * static_cast<int>(laps * sizeof(Reader));
  out.bytes = out.last + kAlign;
  return out;
}

template <class T, int BLOCK>
void run(const LayerLaw& law, const Plan& plan, const CudaLinearBankGradArgs& args) {
  BankGradKernelArgs kernel_args{};
  kernel_args.layer = layer_of(law, args.columns);
  kernel_args.dy = args.dy, kernel_args.x = args.x, kernel_args.dw = args.dw;
  kernel_args.partial = args.workspace, kernel_args.counters = args.counters;
  kernel_args.scale = static_cast<float>(args.scale);
  kernel_args.batch = static_cast<int>(args.batch), kernel_args.copies = plan.splits;
  const BankGradLayout layout = layout_of(law.laps);
  kernel_args.read = layout.read, kernel_args.rounds = layout.rounds;
  kernel_args.readers = layout.readers, kernel_args.last = layout.last;
  launch(linear_bank_grad_kernel<T, BLOCK>, {plan.tiles, plan.splits, 1}, kThreads,
         plan.shared_bytes, args.stream, kernel_args);
}

template <class T>
void run_block(const LayerLaw& law, const Plan& plan, const CudaLinearBankGradArgs& args) {
  law.granularity == 32 ? run<T, 32>(law, plan, args) : run<T, 64>(law, plan, args);
}

}  // namespace

Plan plan_linear_bank_grad(const LayerLaw& law, Dtype, int64_t batch, int64_t,
                           const Device& device) {
  if (!law.taps || law.reflect == Reflect::kElement) {
    throw std::invalid_argument("law: wanted law 3, and signs of blocks");
  }
  Plan out{};
  out.places = kOwned;
  out.tiles = static_cast<int>((law.slots - 1) / kOwned + 1);
  const UnitBand band = make_unit_band(law, 0);
  const int64_t passes = (band.base + int64_t{8} * ring_octets(band) - 1) / law.slots + 1;
  const int64_t copies = passes < device.sms / out.tiles ? passes : device.sms / out.tiles;
  out.splits = copies < 1 ? 1 : static_cast<int>(copies);
  out.batch_tile = kBatch;
  out.batch_tiles = static_cast<int>((batch + kBatch - 1) / kBatch);
  out.shared_bytes = layout_of(law.laps).bytes;
  if (out.shared_bytes > device.shared_bytes) {
    throw std::runtime_error("shared memory: got " + std::to_string(device.shared_bytes) +
                             " bytes for a CTA, wanted " + std::to_string(out.shared_bytes));
  }
  if (out.splits > 1) {
    out.workspace = int64_t{out.splits} * law.slots * law.granularity;
    out.counters = out.tiles;
  }
  return out;
}

void linear_bank_grad(const LayerLaw& law, const Plan& plan, const CudaLinearBankGradArgs& args) {
  switch (args.dtype) {
    case Dtype::kBfloat16: return run_block<Bfloat16>(law, plan, args);
    case Dtype::kFloat16: return run_block<Float16>(law, plan, args);
    default: return run_block<Float32>(law, plan, args);
  }
}

}  // namespace rpg::RPG_DEVICE
